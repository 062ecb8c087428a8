"""Every operation of a store as one Lua script over one Redis hash: what to send, and what the answer means.

Promises: each script judges by the server's clock, checks the record before it writes, and touches its one key alone
(so that a cluster may place it anywhere). Does not: send anything; `redis.py` and `_redis_wire.py` do. Numbers are
whole microseconds below 2^53, as text. About 2 µs to make a request and 1 µs to read an answer. Without state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Append,
    Begin,
    Busy,
    Claim,
    Claimed,
    Completed,
    Doubtful,
    Finish,
    Forget,
    History,
    Read,
    Record,
    Release,
    Renew,
)

__all__ = ["PURGE", "READ", "Request", "Script", "decoded", "purge_one", "read_one", "record", "request"]

_CAP = 100 * 365.25 * 86_400
"""Longer times are this: a hundred years from now is still below 2^53 µs."""

# Fields: v layout, f fence, a attempt, m mark (end of the lease, or instant of the result), o owner, p fingerprint,
# l label, b began, r result, x instant when the result is forgotten, w somebody waits; e0, e1, … the entries of the
# journal, c how many. Nothing is written before all that matters is found to be in order. Replicas get what was done,
# not the script, as they do by default since Redis 5.
_HEAD = """\
local k,t=KEYS[1],redis.call('TIME')
local now=t[1]*1000000+t[2]
local r=redis.call('HMGET',k,'v','f','a','m','o','p','r','x','w')
local f,a,m,x,bad=0,0,0,0,''
local function n(v,least,name)
 v=tonumber(v)
 if v and v>=least and v<=9007199254740991 and v%1==0 then return v end
 bad=bad..' '..name
end
if r[1]=='1' then
 f,a,m=n(r[2],1,'fence'),n(r[3],1,'attempt'),n(r[4],0,'mark')
 if r[7] then x=n(r[8],0,'expires') end
 if not r[5] then bad=bad..' owner' end
 if not r[6] then bad=bad..' fingerprint' end
 if bad~='' then return redis.error_reply('DAMAGED'..bad) end
elseif r[1] or redis.call('EXISTS',k)==1 then
 return redis.error_reply('FOREIGN layout')
end
"""

_CLAIM = """\
local attempt=1
if r[1] and not (r[7] and x<=now) then
 if r[7] then return {2,f,a,r[6],r[7]} end
 if r[5]==ARGV[1] then
  redis.call('HSET',k,'m',string.format('%.0f',now+ARGV[2])){journal}
  return {1,f,a}
 end
 if m>now then
  if ARGV[5]=='1' and not r[9] then redis.call('HSET',k,'w','1') end
  return {3,f,a,r[6],m-now}
 end
 if ARGV[6]~='1' then return {4,f,a,r[6],now-m} end
 attempt=a+1
end
local fence=now
if f>=now then fence=f+1 end
if fence>9007199254740991 or attempt>9007199254740991 then return redis.error_reply('DAMAGED fence') end
local function s(v) return string.format('%.0f',v) end
if attempt>1 then
 redis.call('HSET',k,'f',s(fence),'a',s(attempt),'m',s(now+ARGV[2]),'o',ARGV[1],'p',ARGV[3])
 if ARGV[4]~='' then redis.call('HSET',k,'l',ARGV[4]) end
 if r[9] then redis.call('HDEL',k,'w') end
else
 if r[1] then redis.call('DEL',k) end
 redis.call('HSET',k,'v','1','f',s(fence),'a','1','m',s(now+ARGV[2]),'o',ARGV[1],'p',ARGV[3],'l',ARGV[4],'b',s(now))
end{journal}
return {1,fence,attempt}
"""

# Only where there is no journal yet: a takeover, or the owner again, finds number 0 in its place.
_FIRST = "\nif redis.call('HSETNX',k,'e0',ARGV[7])==1 then redis.call('HSET',k,'c','1') end"

_MINE = """\
if not r[1] or r[5]~=ARGV[1] or (ARGV[2]~='0' and r[2]~=ARGV[2]) then return 0 end
"""

# A server that forbids this user to publish has still done what was asked.
_WAKE = "if r[9] then redis.pcall('PUBLISH',ARGV[3],k) end\n"

_RENEW = """\
if r[7] then return 0 end
redis.call('HSET',k,'m',string.format('%.0f',now+ARGV[3]))
return 1
"""

_COUNT = """\
local c=n(redis.call('HGET',k,'c') or '0',0,'journal')
if bad~='' then return redis.error_reply('DAMAGED'..bad) end
"""

_APPEND = f"""\
if r[7] then return 0 end
{_COUNT}local at=tonumber(ARGV[3])
if at>c then return {{c}} end
local mark=string.format('%.0f',now+ARGV[4])
if at==c then
 redis.call('HSET',k,'e'..ARGV[3],ARGV[6],'c',string.format('%.0f',c+1),'m',mark)
else
 redis.call('HSET',k,'m',mark)
end
if ARGV[5]~='' then redis.call('HSET',k,'l',ARGV[5]) end
return 1
"""

_FINISH = f"""\
if r[7] then return 1 end
redis.call('HSET',k,'r',ARGV[5],'m',string.format('%.0f',now),'x',string.format('%.0f',now+ARGV[4]))
redis.call('PEXPIRE',k,string.format('%.0f',math.ceil(ARGV[4]/1000)))
if r[9] then redis.call('HDEL',k,'w') end
{_WAKE}return 1
"""

_RELEASE = f"""\
if r[7] then return 0 end
redis.call('DEL',k)
{_WAKE}return 1
"""

_ABANDON = f"""\
if r[7] then return 0 end
redis.call('HSET',k,'m',string.format('%.0f',math.min(m,now)))
if r[9] then redis.call('HDEL',k,'w') end
{_WAKE}return 1
"""

_SHOW = """\
if not r[1] or (r[7] and x<=now) then return false end
if ARGV[2]~='' and ARGV[2]~=(r[7] and 'done' or m>now and 'running' or 'in doubt') then return false end
local s=redis.call('HMGET',k,'l','b')
local b=n(s[2],0,'began')
if not s[1] then bad=bad..' label' end
if bad~='' then return redis.error_reply('DAMAGED'..bad) end
if ARGV[1]~='' and not string.find(s[1],ARGV[1],1,true) then return false end
local shown={now,f,a,m,x,b,r[5],r[6],s[1],r[7]}
"""

_READ = _SHOW + "return shown\n"

# In pieces, as a call takes only so many arguments. One that is missing ends it, whatever the count says.
_HISTORY = f"""\
{_SHOW}{_COUNT}local journal={{}}
while #journal<c do
 local names={{}}
 for i=#journal,math.min(#journal+1000,c)-1 do names[#names+1]=string.format('e%.0f',i) end
 for _,entry in ipairs(redis.call('HMGET',k,unpack(names))) do
  if not entry then return redis.error_reply('DAMAGED journal') end
  journal[#journal+1]=entry
 end
end
return {{shown,journal}}
"""

_PURGE = """\
if not r[1] or m>now or m>now-ARGV[1] then return 0 end
redis.call('DEL',k)
return 1
"""

_FORGET = """\
if not r[1] or (not r[7] and m>now) then return 0 end
redis.call('DEL',k)
return 1
"""


class Script:
    """A script, and what EVALSHA needs to name it. `head` is the front of its request on the wire."""

    __slots__ = ("head", "sha", "text", "writes")

    def __init__(self, body: str, *, writes: bool = True) -> None:
        self.text = (_HEAD + body).encode()
        # How the server names scripts; nothing is kept secret by it.
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()
        self.head = b"$7\r\nEVALSHA\r\n$40\r\n" + self.sha + b"\r\n$1\r\n1\r\n"
        self.writes = writes


class Request(NamedTuple):
    """A script to be run on a key."""

    script: Script
    key: bytes
    args: tuple[bytes, ...]

    def packed(self) -> bytes:
        """EVALSHA, as it goes over the wire."""
        script, key, args = self
        parts = [b"$%d\r\n%b\r\n" % (len(each), each) for each in args]
        return b"*%d\r\n%b$%d\r\n%b\r\n%b" % (len(args) + 4, script.head, len(key), key, b"".join(parts))


CLAIM = Script(_CLAIM.replace("{journal}", ""))
BEGIN = Script(_CLAIM.replace("{journal}", _FIRST))
APPEND = Script(_MINE + _APPEND)
RENEW = Script(_MINE + _RENEW)
FINISH = Script(_MINE + _FINISH)
RELEASE = Script(_MINE + _RELEASE)
ABANDON = Script(_MINE + _ABANDON)
READ = Script(_READ, writes=False)
HISTORY = Script(_HISTORY, writes=False)
PURGE = Script(_PURGE)
FORGET = Script(_FORGET)


def _micros(seconds: float) -> bytes:
    return b"%d" % (min(max(seconds, 0.0), _CAP) * 1e6)


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _str(data: Any) -> str:
    try:
        text: str = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise StoreError("a record is damaged: a text in it is not UTF-8") from None
    return text


def read_one(key: bytes, text: str = "", state: str = "") -> Request:
    """Ask for the record of the (whole) key, if its label contains `text`, and it is in this state (or "": any)."""
    return Request(READ, key, (_text(text), _text(state)))


def purge_one(key: bytes, older_than: float) -> Request:
    """Remove the (whole) key if it ended `older_than` seconds ago."""
    return Request(PURGE, key, (_micros(older_than),))


def request(op: AnyOp, prefix: bytes, channel: bytes) -> Request:
    """What to send for `op`. `Scan` and `Purge` are of more than one request: see `read_one` and `purge_one`."""
    kind = type(op)
    if kind is Claim:
        return _claim(op, prefix)  # type: ignore[arg-type]
    return _MAKE[kind](op, prefix + _text(op.key), channel)  # type: ignore[attr-defined]


def _claim(op: Claim, prefix: bytes) -> Request:
    args = (
        op.owner.encode("utf-8", "surrogatepass"),
        _micros(op.lease),
        op.fingerprint.encode("utf-8", "surrogatepass"),
        op.label.encode("utf-8", "surrogatepass"),
        b"1" if op.awaited else b"0",
        b"1" if op.take_over else b"0",
    )
    return Request(CLAIM, prefix + op.key.encode("utf-8", "surrogatepass"), args)


def _begin(op: Begin, key: bytes, _: bytes) -> Request:
    over = b"1" if op.take_over else b"0"
    return Request(BEGIN, key, (_text(op.owner), _micros(op.lease), b"", _text(op.label), b"0", over, op.entry))


def _append(op: Append, key: bytes, _: bytes) -> Request:
    ours = (_text(op.owner), b"%d" % op.fence, b"%d" % op.at, _micros(op.lease))
    return Request(APPEND, key, (*ours, _text(op.label), op.entry))


def _finish(op: Finish, key: bytes, channel: bytes) -> Request:
    # At least a microsecond: no server takes 0 for a time to live.
    ttl = max(op.ttl, 1e-6)
    return Request(FINISH, key, (_text(op.owner), b"%d" % op.fence, channel, _micros(ttl), op.result))


_MAKE: Mapping[type[AnyOp], Callable[[Any, bytes, bytes], Request]] = {
    Begin: _begin,
    Append: _append,
    History: lambda op, key, _: Request(HISTORY, key, (b"", b"")),
    Renew: lambda op, key, _: Request(RENEW, key, (_text(op.owner), b"%d" % op.fence, _micros(op.lease))),
    Finish: _finish,
    Release: lambda op, key, channel: Request(RELEASE, key, (_text(op.owner), b"%d" % op.fence, channel)),
    Abandon: lambda op, key, channel: Request(ABANDON, key, (_text(op.owner), b"%d" % op.fence, channel)),
    Read: lambda op, key, _: read_one(key),
    Forget: lambda op, key, _: Request(FORGET, key, ()),
}


def decoded(op: AnyOp, reply: Any) -> Any:
    """The answer to `op` that the server's `reply` stands for."""
    kind = type(op)
    if kind is Claim or kind is Begin:
        return _claimed(reply)
    if kind is Read:
        return record(op.key, reply)  # type: ignore[attr-defined]
    if kind is History:
        return _history(op, reply)  # type: ignore[arg-type]
    if kind is Append and reply not in (0, 1):
        (count,) = reply
        raise StoreError(f"the journal of {op.key} has {count} entries: number {op.at} would leave a gap")  # type: ignore[attr-defined]
    return reply == 1


def _history(op: History, reply: Any) -> tuple[Record | None, tuple[bytes, ...]] | None:
    if reply is None:
        return None
    shown, journal = reply
    return record(op.key, shown), tuple(journal)


def _claimed(reply: Sequence[Any]) -> Claimed:
    outcome = reply[0]
    if outcome == 1:
        return Acquired(reply[1], reply[2])
    if outcome == 2:
        return Completed(reply[1], reply[2], _str(reply[3]), reply[4])
    kind = Busy if outcome == 3 else Doubtful
    return kind(reply[1], reply[2], _str(reply[3]), reply[4] / 1e6)


def record(key: str, reply: Any) -> Record | None:
    """The record that a reply to `read_one` tells of."""
    if reply is None:
        return None
    now, fence, attempt, mark, expires, began, owner, fingerprint, label, result = reply
    return Record(
        key=key,
        state="done" if result is not None else "running" if mark > now else "in doubt",
        owner=_str(owner),
        fence=fence,
        attempt=attempt,
        fingerprint=_str(fingerprint),
        label=_str(label),
        began_at=began / 1e6,
        mark=mark / 1e6,
        expires_at=None if result is None else expires / 1e6,
        result=result,
    )
