#!/bin/bash
# The replication protocol: pg_basebackup, pg_verifybackup and pg_receivewal, in the current directory.
set -uo pipefail

here=$(mktemp -d "$PWD/replication-XXXXXX")
trap 'rm -rf "$here"' EXIT

role() { psql -XAtqc "SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END" 2>&1; }

basebackup() {
    rm -rf "$here/copy"
    pg_basebackup -D "$here/copy" -c fast --no-sync 2>&1 && pg_verifybackup -n "$here/copy" 2>&1
}

# A finished segment means that the WAL of a whole one has come.
receivewal() {
    mkdir -p "$here/wal"
    timeout 30 pg_receivewal -D "$here/wal" --no-loop --no-sync >&2 &
    local pid=$! _
    for _ in $(seq 100); do
        psql -XAtqc "SELECT pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()" >/dev/null
        if compgen -G "$here/wal/*[0-9A-F]" >/dev/null; then echo received && break; fi
        sleep 0.2
    done
    kill -INT "$pid" && wait "$pid"
}

hold-basebackup() {
    waiting
    rm -rf "$here/slow"
    pg_basebackup -D "$here/slow" -c fast --no-sync --max-rate 32k 2>&1
}

hold-receivewal() {
    waiting
    mkdir -p "$here/wal"
    pg_receivewal -D "$here/wal" --no-loop --no-sync 2>&1
}

. "${0%/*}/steps.sh"
