"""patronictl as installed. Loading it takes half a second, so that is done once, and every command line has a process of its own.

Each line of standard input is a JSON object with `arguments` and `input`; it is answered by one with `code`, `out` and `err`.
"""
import json
import os
import sys
import tempfile

# What patronictl itself loads when it is first needed.
import patroni.dcs.etcd3
import patroni.psycopg
import wcwidth
from patroni.ctl import ctl

wcwidth.wcswidth("")


def carry_out(arguments, *files):
    for descriptor, file in enumerate(files):
        os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, closefd=False)
    sys.argv = ["patronictl", *arguments]
    # What bin/patronictl does.
    sys.exit(ctl())


# Standard input is patronictl's in the processes to come.
cases = os.fdopen(os.dup(0))
for line in iter(cases.readline, ""):
    case = json.loads(line)
    with tempfile.TemporaryFile() as typed, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        typed.write(case["input"].encode())
        typed.seek(0)
        child = os.fork()
        if child == 0:
            carry_out(case["arguments"], typed, out, err)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        answer = {"code": code, "out": out.read().decode(), "err": err.read().decode()}
    print(json.dumps(answer), flush=True)
