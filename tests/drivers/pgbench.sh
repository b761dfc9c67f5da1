#!/bin/bash
# pgbench: its own clients, four sessions at once.
set -uo pipefail

bench() { pgbench -n -c 4 -M prepared -f /dev/stdin "$@" 2>&1 <<<"SELECT pg_is_in_recovery(), repeat('x', 100000);"; }

role() { psql -XAtqc "SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END" 2>&1; }

# Four sessions of 250 transactions.
load() { bench -t 250 | sed -n 's/^number of transactions actually processed: //p'; }

hold-load() { waiting && bench -R 100 -T 600; }

. "${0%/*}/steps.sh"
