"""psycopg 3, on libpq."""

import sys
import threading
import time

import psycopg

ROW = b"x" * 10_000 + b"\n"


def connect():
    return psycopg.connect(autocommit=True)


def one(connection, sql, *values):
    return connection.execute(sql, values).fetchone()[0]


def role():
    with connect() as connection:
        return "standby" if one(connection, "SELECT pg_is_in_recovery()") else "primary"


def tls():
    with connect() as connection:
        return "on" if one(connection, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") else "off"


def large():
    with connect() as connection:
        return len(one(connection, "SELECT %s::text", "x" * (16 << 20)))


def copy_out():
    with connect() as connection, connection.cursor() as cursor:
        with cursor.copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT") as copy:
            return sum(len(data) for data in copy)


def copy_in():
    with connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE numbers (n int)")
        with cursor.copy("COPY numbers FROM STDIN") as copy:
            for n in range(1, 100_001):
                copy.write_row((n,))
        return one(connection, "SELECT sum(n) FROM numbers")


def cancel():
    with connect() as connection:
        done = threading.Event()
        # Encrypted as the session is, from libpq 17 on.
        request = getattr(connection, "cancel_safe", connection.cancel)

        def again_and_again():
            # A request may overtake the query that it is meant for.
            while not done.wait(0.2):
                request()

        thread = threading.Thread(target=again_and_again)
        thread.start()
        try:
            return one(connection, "SELECT pg_sleep(60)")
        except psycopg.Error as error:
            return error.sqlstate
        finally:
            done.set()
            thread.join()


def listen():
    with connect() as connection, connect() as other:
        connection.execute("LISTEN psycopg")
        other.execute("NOTIFY psycopg, 'hello'")
        return next(connection.notifies()).payload


def hold_query():
    with connect() as connection:
        connection.execute("SELECT 1")
        yield
        connection.execute("SELECT pg_sleep(600)")


def hold_copy_in():
    with connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE lines (line text)")
        with cursor.copy("COPY lines FROM STDIN") as copy:
            yield
            while True:
                copy.write(ROW)
                time.sleep(0.05)


def hold_copy_out():
    with connect() as connection, connection.cursor() as cursor:
        with cursor.copy("COPY (SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i) TO STDOUT") as copy:
            yield
            for _ in copy:
                pass


def hold_listen():
    with connect() as connection:
        connection.execute("LISTEN psycopg_held")
        yield
        for _ in connection.notifies():
            pass


def say(step, answer):
    print(f"{step}: {answer}", flush=True)


def hold(step, held):
    try:
        for _ in held:
            say(step, "waiting")
        say(step, "finished")
    except psycopg.Error:
        say(step, "ended")
    say(step, role())


def main():
    for step in sys.argv[1:]:
        try:
            done = globals()[step.replace("-", "_")]()
            if step.startswith("hold-"):
                hold(step, done)
            else:
                say(step, done)
        except psycopg.Error as error:
            say(step, f"{error.sqlstate} {error}".replace("\n", " "))


main()
