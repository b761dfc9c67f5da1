"""asyncpg, with its own protocol code."""

import asyncio
import io
import os
import sys

import asyncpg

ROW = b"x" * 10_000 + b"\n"


async def connect():
    return await asyncpg.connect(timeout=60)


async def role():
    connection = await connect()
    return "standby" if await connection.fetchval("SELECT pg_is_in_recovery()") else "primary"


async def tls():
    connection = await connect()
    sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    return "on" if await connection.fetchval(sql) else "off"


async def large():
    connection = await connect()
    return len(await connection.fetchval("SELECT $1::text", "x" * (16 << 20)))


async def copy_out():
    connection = await connect()
    out = io.BytesIO()
    await connection.copy_from_query("SELECT generate_series(1, 100000)", output=out)
    return len(out.getvalue())


async def copy_in():
    connection = await connect()
    await connection.execute("CREATE TEMPORARY TABLE numbers (n int)")
    lines = io.BytesIO(b"".join(b"%d\n" % n for n in range(1, 100_001)))
    await connection.copy_to_table("numbers", source=lines)
    return await connection.fetchval("SELECT sum(n) FROM numbers")


async def cancel():
    connection = await connect()
    asleep = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0.5)
    # asyncpg sends the CancelRequest when the task is cancelled, and waits for its end before the session is used again.
    asleep.cancel()
    try:
        await asleep
        return "finished"
    except asyncio.CancelledError:
        pass
    await asyncio.wait_for(connection.execute("SELECT 1"), 20)
    return "57014"


async def listen():
    connection, other = await connect(), await connect()
    heard = asyncio.get_running_loop().create_future()
    await connection.add_listener("asyncpg", lambda _c, _pid, _channel, payload: heard.set_result(payload))
    await other.execute("NOTIFY asyncpg, 'hello'")
    return await asyncio.wait_for(heard, 20)


async def hold_query(waiting):
    connection = await connect()
    waiting()
    await connection.execute("SELECT pg_sleep(600)")


async def hold_copy_in(waiting):
    connection = await connect()
    await connection.execute("CREATE TEMPORARY TABLE lines (line text)")

    # asyncpg looks for the end of the session only when the rows are over.
    async def rows():
        waiting()
        while not connection.is_closed():
            yield ROW
            await asyncio.sleep(0.05)

    await connection.copy_to_table("lines", source=rows())


async def hold_copy_out(waiting):
    connection = await connect()
    waiting()
    with open(os.devnull, "wb") as out:
        await connection.copy_from_query("SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i", output=out)


async def hold_listen(waiting):
    connection = await connect()
    ended = asyncio.Event()
    connection.add_termination_listener(lambda _connection: ended.set())
    await connection.add_listener("asyncpg_held", lambda *_: None)
    waiting()
    await ended.wait()
    raise ConnectionError


def say(step, answer):
    print(f"{step}: {answer}", flush=True)


async def hold(step, function):
    try:
        await function(lambda: say(step, "waiting"))
        say(step, "finished")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        say(step, "ended")
    say(step, await role())


async def main():
    for step in sys.argv[1:]:
        function = globals()[step.replace("-", "_")]
        try:
            if step.startswith("hold-"):
                await hold(step, function)
            else:
                say(step, await function())
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            say(step, f"{type(error).__name__} {error}".replace("\n", " "))


asyncio.run(main())
