"""Writes resilient/demo/orders.csv, the same bytes each time. Every person, address and product in it is invented.

`python -m tests.make_orders` writes the file; `tests/test_demo.py` holds that the file is what this makes.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ORDERS = 600
FIELDS = (
    "order_id",
    "customer",
    "email",
    "street",
    "postcode",
    "city",
    "country",
    "sku",
    "product",
    "quantity",
    "price",
)

FIRST = """
    Adaeze Aiko Alejandro Amara Anneli Anouk Aoife Arjun Astrid Beatriz Birgit Bohdan Bronwen Camille Carlos
    Chiara Chidi Claudia Daniela Darius Dilnoza Dorota Eero Eleni Emre Esther Fatou Fergus Filippa Florian Gita
    Goran Greta Halima Hamid Hanna Henrik Hiroshi Ilse Imani Ingrid Isabel Ivo Jelena Joaquim Jorunn Kaito Karim
    Katarzyna Kenji Kofi Lars Leila Liam Linh Lucía Łukasz Magnus Maja Marek Matilde Mehmet Mirela Naledi Niamh
    Noor Olamide Ondřej Paloma Pekka Petra Priya Rania Raúl Renske Ravi Sadia Salome Sanne Saoirse Siobhán Søren
    Sunniva Tadeusz Tamar Teodora Thandiwe Tomás Ulrike Valentina Viktor Wanjiru Xanthe Yara Yusuf Zofia Zsófia
    Åsa
""".split()  # noqa: SIM905
LAST = """
    Abara Adeyemi Almeida Andrade Aydin Bakker Banerjee Barbieri Becker Bergström Bianchi Błaszczyk Borg Brennan
    Caruso Castellanos Chaudhry Chukwu Costa Dahl Dekker Delacroix Demir Dimitrov Doherty Dubois Eklund Eriksen
    Fekete Ferrari Fischer Fontaine Garrido Gunnarsson Haddad Halvorsen Hartmann Heikkinen Hoffmann Horvat
    Ibarra Ito Jansen Jokinen Kamara Kaplan Karlsson Keller Kimura Kovács Kowalczyk Kraus Kumar Larsen Lindqvist
    Lombardi Maalouf MacLeod Mäkinen Marchetti Mensah Moreau Mwangi Nagy Nakamura Navarro Ndiaye Nguyen Novák
    Nowak O'Sullivan Okafor Olsen Osei Papadakis Pereira Petrović Popescu Quintana Rahman Ribeiro Richter Rossi
    Sandoval Schäfer Sørensen Szabó Takahashi Tanaka Ünal Vandenberg Vasquez Virtanen Vogel Weber Wójcik
    Yamamoto Yilmaz Zieliński
""".split()  # noqa: SIM905
STREETS = (
    """
    Acorn|Alder|Amber|Anchor|Barley|Beacon|Birch|Bramble|Brickyard|Canal|Chapel|Cherry|Clover|Copper|Cornflower|Dovecote|
    Elder|Falcon|Fern|Foundry|Garden|Glassworks|Granary|Harbour|Hazel|Heron|Juniper|Kestrel|Lantern|Larch|Lighthouse|
    Linden|Maple|Meadow|Mill|Nightingale|Oak|Observatory|Orchard|Paper Mill|Pebble|Poplar|Quarry|Quay|Rowan|Saddler|
    Sparrow|Spring|Station|Tannery|Thistle|Tram|Vineyard|Walnut|Weaver|Willow|Windmill|Wren
""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)
WAYS = ("Street", "Lane", "Road", "Row", "Square", "Way", "Close", "Terrace")
CITIES = (
    ("Aarhus", "DK", "80"), ("Antwerp", "BE", "20"), ("Bergen", "NO", "50"), ("Bologna", "IT", "401"),
    ("Brno", "CZ", "60"), ("Bruges", "BE", "80"), ("Cork", "IE", "T12 "), ("Debrecen", "HU", "40"),
    ("Galway", "IE", "H91 "), ("Gdańsk", "PL", "80"), ("Ghent", "BE", "90"), ("Gothenburg", "SE", "41"),
    ("Graz", "AT", "80"), ("Groningen", "NL", "97"), ("Kaunas", "LT", "44"), ("Košice", "SK", "04"),
    ("Leipzig", "DE", "041"), ("Ljubljana", "SI", "10"), ("Lyon", "FR", "690"), ("Málaga", "ES", "290"),
    ("Nantes", "FR", "440"), ("Odense", "DK", "50"), ("Patras", "GR", "26"), ("Plovdiv", "BG", "40"),
    ("Porto", "PT", "40"), ("Riga", "LV", "10"), ("Split", "HR", "21"), ("Tampere", "FI", "331"),
    ("Tartu", "EE", "51"), ("Timișoara", "RO", "30"), ("Trieste", "IT", "341"), ("Utrecht", "NL", "35"),
    ("Valencia", "ES", "460"), ("Wrocław", "PL", "50"), ("Würzburg", "DE", "970"), ("Zaragoza", "ES", "500"),
)  # fmt: skip
PRODUCTS = (
    ("AUD-101", "Wireless earbuds, graphite", "59.90"), ("AUD-114", "Bookshelf speaker, walnut (pair)", "249.00"),
    ("AUD-120", "Kitchen radio with DAB", "84.50"), ("BIK-204", "Bicycle lamp set, USB-C", "39.95"),
    ("BIK-211", "Pannier bag, 20 l, waterproof", "74.00"), ("BIK-230", "Puncture repair kit", "6.49"),
    ("BOK-301", "Atlas of forgotten railways", "34.00"), ("BOK-317", "Bread from five continents", "28.50"),
    ("BOK-322", "The tide table, a novel", "14.99"), ("BOK-340", "Watercolour for beginners", "19.95"),
    ("CAM-402", "Compact tripod, carbon", "129.00"), ("CAM-409", "Lens cleaning set", "12.80"),
    ("CAM-415", "Instant film, 20 sheets", "21.49"), ("COF-501", "Espresso beans, 1 kg", "18.90"),
    ("COF-506", "Pour-over stand, oak", "46.00"), ("COF-512", "Hand grinder, steel burrs", "89.95"),
    ("COF-533", "Descaler, 3 sachets", "7.25"), ("ELE-603", "Mechanical keyboard, 75 %", "139.00"),
    ("ELE-610", "USB-C hub, 7 ports", "44.90"), ("ELE-618", "External SSD, 2 TB", "154.99"),
    ("ELE-627", "E-ink reader, 7 inch", "179.00"), ("ELE-640", "Laptop stand, aluminium", "38.75"),
    ("ELE-655", "Video conference bar", "649.00"), ("GAR-701", "Secateurs, forged", "31.20"),
    ("GAR-708", "Raised bed, larch, 120 cm", "118.00"), ("GAR-715", "Wildflower seeds, 50 m²", "9.95"),
    ("GAR-722", "Rain barrel, 200 l", "67.40"), ("HOM-804", "Linen duvet cover, sage", "96.00"),
    ("HOM-811", "Cast-iron casserole, 4.2 l", "159.00"), ("HOM-819", "Beeswax candle", "4.80"),
    ("HOM-826", "Wall clock, silent", "27.90"), ("HOM-833", "Robot vacuum cleaner", "429.00"),
    ("HOM-840", "Storage jar, 750 ml", "5.60"), ("KID-902", "Marble run, 85 parts", "42.00"),
    ("KID-909", "Picture book, The Blue Heron", "13.50"), ("KID-917", "Balance bike, red", "109.00"),
    ("OFF-011", "Notebook, dotted, A5", "8.90"), ("OFF-018", "Fountain pen, fine nib", "33.40"),
    ("OFF-025", "Desk lamp, dimmable", "79.00"), ("OFF-039", "Office chair, mesh", "389.00"),
    ("OUT-107", "Headlamp, 400 lm", "36.95"), ("OUT-113", "Two-person tent, 1.9 kg", "279.00"),
    ("OUT-121", "Merino socks, size 42", "16.90"), ("OUT-128", "Folding stove", "54.30"),
    ("OUT-136", "Vacuum flask, 1 l", "29.99"), ("PET-205", "Dog harness, medium", "26.75"),
    ("PET-212", "Cat tree, 140 cm", "88.00"), ("PET-220", "Bird feeder, cedar", "23.60"),
    ("TOO-303", "Cordless drill, 18 V", "134.90"), ("TOO-310", "Torque wrench", "61.00"),
    ("TOO-318", "Wood screws, 4 × 40, box of 200", "8.35"), ("TOO-327", "Spirit level, 60 cm", "17.80"),
    ("TOY-408", "Chess set, maple", "58.00"), ("TOY-416", "Jigsaw puzzle, 1000 pieces", "15.99"),
    ("TOY-431", "Model locomotive, H0", "219.50"), ("WEL-506", "Yoga mat, cork", "49.00"),
    ("WEL-513", "Kettlebell, 12 kg", "41.25"), ("WEL-529", "Massage ball", "7.90"),
)  # fmt: skip
QUANTITIES = (1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 4, 6, 12)


def orders() -> str:
    """The whole file as text."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(FIELDS)
    for number in range(1, ORDERS + 1):
        first, last = _pick(FIRST, number, "first"), _pick(LAST, number, "last")
        street = (
            f"{_pick(range(1, 190), number, 'house')} {_pick(STREETS, number, 'street')} {_pick(WAYS, number, 'way')}"
        )
        city, country, code = _pick(CITIES, number, "city")
        sku, product, listed = _pick(PRODUCTS, number, "product")
        # Prices are as of the day of the order: up to 15 % off the list price, in whole cents.
        price = (Decimal(listed) * (100 - _pick((0, 0, 0, 5, 10, 15), number, "rebate")) / 100).quantize(
            Decimal("0.01")
        )
        quantity = _pick(QUANTITIES, number, "quantity") if price < 150 else 1
        postcode = code + f"{_pick(range(1000), number, 'post'):03}"[: 3 if " " in code else max(0, 5 - len(code))]
        lines.writerow(
            (
                *(f"R-{2600 + number}", f"{first} {last}", f"customer{number}@example.org"),
                *(street, postcode, city, country),
                *(sku, product, quantity, price),
            )
        )
    return out.getvalue()


def _pick(choices: Sequence[T], number: int, what: str) -> T:
    digest = hashlib.sha256(f"{what} {number}".encode()).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "resilient" / "demo" / "orders.csv"
    path.write_text(orders(), encoding="utf-8")
