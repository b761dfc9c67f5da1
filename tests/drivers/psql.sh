#!/bin/bash
# psql, on libpq.
set -uo pipefail

sql() { psql -XAtq -v ON_ERROR_STOP=1 -v VERBOSITY=sqlstate "$@" 2>&1; }

role() { sql -c "SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END"; }
tls() { sql -c "SELECT CASE WHEN ssl THEN 'on' ELSE 'off' END FROM pg_stat_ssl WHERE pid = pg_backend_pid()"; }

large() {
    { printf "SELECT '" && head -c 16777216 /dev/zero | tr '\0' x && echo "'"; } | sql | tr -d '\n' | wc -c
}

copy-out() { sql -c "COPY (SELECT generate_series(1, 100000)) TO STDOUT" | wc -c; }

copy-in() {
    seq 100000 | sql -c "CREATE TEMPORARY TABLE numbers (n int)" -c "COPY numbers FROM STDIN" -c "SELECT sum(n) FROM numbers"
}

cancel() {
    local line="" pid
    exec 4< <(exec psql -XAtq -v VERBOSITY=sqlstate -c "SELECT 'asleep'" -c "SELECT pg_sleep(60)" 2>&1)
    pid=$!
    read -r line <&4
    # A request may overtake the query that it is meant for.
    until [[ $line == ERROR:* ]]; do
        read -r -t 0.3 line <&4 || kill -INT "$pid" || break
    done
    echo "${line#ERROR:  }"
}

listen() {
    sql -c "LISTEN psql" -c "NOTIFY psql, 'hello'" | sed -E 's/.*with payload "(.*)" received.*/\1/'
}

hold-query() { waiting && sql -c "SELECT pg_sleep(600)"; }
hold-copy-out() { waiting && sql -c "COPY (SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i) TO STDOUT"; }

hold-copy-in() {
    local row
    row=$(head -c 10000 /dev/zero | tr '\0' x)
    waiting
    while sleep 0.05; do echo "$row" || break; done 2>/dev/null |
        sql -c "CREATE TEMPORARY TABLE lines (line text)" -c "COPY lines FROM STDIN"
}

# psql tells notifications only after a statement.
hold-listen() { waiting && printf 'LISTEN psql_held;\nSELECT 1 \\watch 0.1\n' | sql; }

. "${0%/*}/steps.sh"
