"""The scripts that the store runs in Redis. Redis runs each one alone, from start to end; all its keys share a slot.

Where a fingerprint's index is logged, its log (id -> microseconds since 1970) and its list of removed ids are kept with
every change, so that an exact index in a replica's memory reads what changed and no more.
"""

from typing import Final

GONE_SECONDS: Final = 3600
"""For how long it is known that a vector was removed. Who has not looked for so long reads everything again."""

_SET_VECTOR = """
-- True if something changed. To index a vector again costs up to 0.5 ms, so one that did not change is left.
local function set_vector(key, vector, attributes)
  if vector == '' then return redis.call('UNLINK', key) == 1 end
  local old = redis.call('HMGET', key, 'v', 'a')
  if old[1] == vector and (old[2] or '') == attributes then return false end
  local new = {}
  if attributes ~= '' then new = cjson.decode(attributes) end
  if old[2] then
    for field in pairs(cjson.decode(old[2])) do
      if not new[field] then redis.call('HDEL', key, field) end
    end
    if attributes == '' then redis.call('HDEL', key, 'a') end
  end
  local command = {'HSET', key, 'v', vector}
  if attributes ~= '' then
    command[5], command[6] = 'a', attributes
    for field, value in pairs(new) do command[#command + 1] = field; command[#command + 1] = value end
  end
  redis.call(unpack(command))
  return true
end
"""

_NOTE = f"""
-- changed, removed: lists of ids. A time is never given twice, also not where the clock was set back.
local function note(log, gone, changed, removed)
  if #changed + #removed == 0 then return end
  local time = redis.call('TIME')
  local now = time[1] * 1000000 + time[2]
  for _, key in ipairs({{log, gone}}) do
    local last = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2]
    if last and tonumber(last) >= now then now = tonumber(last) + 1 end
  end
  local score = string.format('%.0f', now)
  for _, id in ipairs(changed) do redis.call('ZADD', log, score, id); redis.call('ZREM', gone, id) end
  for _, id in ipairs(removed) do redis.call('ZREM', log, id); redis.call('ZADD', gone, score, id) end
  redis.call('ZREMRANGEBYSCORE', gone, '-inf', string.format('%.0f', now - {GONE_SECONDS}000000))
end
"""

PUT = (
    _SET_VECTOR
    + _NOTE
    + """
-- KEYS: counter; for each logged fingerprint its log and its removed ids; for each item its hash, a key a fingerprint
-- ARGV: a flag a fingerprint ('1': logged), where the id begins in an item's key; for each item raw, rev, and for each
--       fingerprint the vector (empty: it has none) and its attributes
local flags, start = ARGV[1], tonumber(ARGV[2])
local key, arg, new, created, changes = 2, 3, 0, {}, {}
for i = 1, #flags do
  if string.sub(flags, i, i) == '1' then
    changes[i] = {KEYS[key], KEYS[key + 1], {}, {}}
    key = key + 2
  end
end
while KEYS[key] do
  local added = redis.call('HSET', KEYS[key], 'raw', ARGV[arg], 'rev', ARGV[arg + 1])
  if added > 0 then new = new + 1; created[#created + 1] = 1 else created[#created + 1] = 0 end
  for i = 1, #flags do
    local vector = ARGV[arg + 2 * i]
    if set_vector(KEYS[key + i], vector, ARGV[arg + 2 * i + 1]) and changes[i] then
      local ids = changes[i][vector == '' and 4 or 3]
      ids[#ids + 1] = string.sub(KEYS[key], start)
    end
  end
  key, arg = key + 1 + #flags, arg + 2 + 2 * #flags
end
if new > 0 then redis.call('INCRBY', KEYS[1], new) end
for _, change in pairs(changes) do note(unpack(change)) end
return created
"""
)

ADD = (
    _SET_VECTOR
    + _NOTE
    + """
-- KEYS: the log and the removed ids; for each item its hash and its vector key
-- ARGV: 1 if it is logged, where the id begins in an item's key; for each item the rev it must have, the vector and
--       its attributes
local start, changed, removed, written, arg = tonumber(ARGV[2]), {}, {}, 0, 3
for i = 3, #KEYS, 2 do
  if redis.call('HGET', KEYS[i], 'rev') == ARGV[arg] then
    written = written + 1
    local id = string.sub(KEYS[i], start)
    local did = set_vector(KEYS[i + 1], ARGV[arg + 1], ARGV[arg + 2])
    if ARGV[1] == '1' then
      if ARGV[arg + 1] == '' then
        if did then removed[#removed + 1] = id end
      else  -- also where nothing changed now: a write may have changed it before anyone noted that
        changed[#changed + 1] = id
      end
    end
  end
  arg = arg + 3
end
note(KEYS[1], KEYS[2], changed, removed)
return written
"""
)

DELETE = (
    _NOTE
    + """
-- KEYS: counter; for each fingerprint its log and its removed ids; for each item its hash and a key a fingerprint
-- ARGV: number of fingerprints, where the id begins in an item's key
local fingerprints, start = tonumber(ARGV[1]), tonumber(ARGV[2])
local existed, gone, removed = {}, 0, {}
for i = 1, fingerprints do removed[i] = {} end
local key = 2 + 2 * fingerprints
while KEYS[key] do
  local was = redis.call('UNLINK', KEYS[key])
  existed[#existed + 1] = was
  gone = gone + was
  for i = 1, fingerprints do
    if redis.call('UNLINK', KEYS[key + i]) == 1 and redis.call('EXISTS', KEYS[2 * i]) == 1 then
      removed[i][#removed[i] + 1] = string.sub(KEYS[key], start)
    end
  end
  key = key + 1 + fingerprints
end
for i = 1, fingerprints do note(KEYS[2 * i], KEYS[2 * i + 1], {}, removed[i]) end
if gone > 0 then redis.call('DECRBY', KEYS[1], gone) end
return existed
"""
)

REMOVE_ORPHANS = (
    _NOTE
    + """
-- KEYS: the log and the removed ids; for each item its hash and its vector key; ARGV: where the id begins
local removed = {}
for i = 3, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 0 and redis.call('UNLINK', KEYS[i + 1]) == 1 then
    if redis.call('EXISTS', KEYS[1]) == 1 then removed[#removed + 1] = string.sub(KEYS[i], tonumber(ARGV[1])) end
  end
end
note(KEYS[1], KEYS[2], {}, removed)
"""
)

LOG = (
    _NOTE
    + """
-- KEYS: the log and the removed ids; vector keys. ARGV: where the id begins in those
local changed = {}
for i = 3, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then changed[#changed + 1] = string.sub(KEYS[i], tonumber(ARGV[1])) end
end
note(KEYS[1], KEYS[2], changed, {})
"""
)

TICK = """
-- Moves the numbers of exact indexes on: microseconds since 1970, or one more. KEYS: the hash; ARGV: fingerprints
-- Where Redis is full a script may write on after a write that takes no memory: a deletion has to be told even so.
redis.call('HDEL', KEYS[1], '')
for _, fp in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], fp .. ':made') == 1 then
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    local last = tonumber(redis.call('HGET', KEYS[1], fp) or 0)
    if last >= now then now = last + 1 end
    redis.call('HSET', KEYS[1], fp, string.format('%.0f', now))
  end
end
"""

SEARCH_LIKE = """
-- What is near to a stored vector, in one round trip. KEYS: the vector's; ARGV: those of FT.SEARCH, but for the vector
redis.setresp(3)
local vector = redis.call('HGET', KEYS[1], 'v')
if not vector then return false end
ARGV[#ARGV + 1] = vector
return redis.call('FT.SEARCH', unpack(ARGV))
"""

UNMARK = """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('SREM', KEYS[2], ARGV[1])
"""

CLAIM = """
local holder = redis.call('GET', KEYS[1]) or ARGV[1]
if holder == ARGV[1] then redis.call('SET', KEYS[1], holder, 'PX', ARGV[2]) end
return holder
"""

RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
