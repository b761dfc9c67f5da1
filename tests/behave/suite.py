#!/usr/bin/env python3
"""Runs Patroni's own acceptance suite (behave) with our agent and our command line in the place of Patroni's.

  suite.py run --patroni DIR --agent FILE --ctl FILE [--jobs N] [--out DIR] [--slow] [FEATURE ...]
  suite.py one FEATURE        one feature in the current directory, a copy of the checkout; `run` starts it like that

The suite is not changed. It starts each process of the product as `PYTHON -m coverage run … patroni.py FILE` or `… patronictl.py ARGS`;
`one` runs behave in its own process and puts our programs there instead. Everything else is Patroni's: scenarios, time limits, the
client with which it asks, the certificate that is CA, server and client at once.

As root every feature runs as an unprivileged user in namespaces of its own for network and processes: the ports that the suite insists on
are always free, features can run side by side, and what an agent leaves behind ends with its feature. Otherwise one at a time.

Printed at the end: a line for each feature, and each scenario that failed with its step. A scenario that was not reached has failed.
Exit status: 0 if nothing failed.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

# What the suite imports, and what the part of Patroni needs that it uses as its client.
PACKAGES = ['behave', 'coverage', 'parse', 'psutil', 'psycopg2-binary', 'python-dateutil', 'PyYAML', 'click', 'cryptography',
            'prettytable', 'python-etcd<0.5', 'urllib3', 'ydiff>=1.2.0,<1.5,!=1.4.0,!=1.4.1']
LIMIT = 900  # seconds for a feature; the longest takes two minutes
HERE = pathlib.Path(__file__).resolve()


def one(feature):
    """behave, with our programs where the suite starts Patroni's."""
    ours = {'patroni.py': os.environ.pop('TRUNKLINE_AGENT'), 'patronictl.py': os.environ.pop('TRUNKLINE_CTL')}

    def swapped(command):
        if not isinstance(command, (list, tuple)) or list(command[:3]) != [sys.executable, '-m', 'coverage']:
            # Newer servers of etcd refuse the flag of an API that is not used here.
            return [word for word in command if word != '--enable-v2=true'] if command[0] == 'etcd' else command
        names = [os.path.basename(word) for word in command]
        script = next((name for name in ours if name in names), None)
        # Without one it is the report on the coverage of what was not run.
        return [ours[script], *command[names.index(script) + 1:]] if script else ['true']

    original = subprocess.Popen.__init__
    subprocess.Popen.__init__ = lambda self, command, *a, **k: original(self, swapped(command), *a, **k)
    sys.path[0] = os.getcwd()
    from behave.__main__ import main
    return main(['--no-color', '-f', 'json.pretty', '-o', 'result.json', '-f', 'plain', '--show-timings', '-o', 'steps.txt',
                 f'features/{feature}.feature'])


def environment(options, home, venv, postgres):
    path = ':'.join([f'{venv}/bin', postgres, '/usr/local/bin', '/usr/bin', '/bin', '/usr/sbin', '/sbin'])
    scale = {'BUILD_NUMBER': '1'} if options.slow else {}  # the suite's own switch: its limits times five
    return {'PATH': path, 'HOME': home, 'TMPDIR': home, 'LANG': 'C.UTF-8', 'DCS': 'etcd3', **scale,
            'TRUNKLINE_AGENT': f'{options.bin}/trunkline-agent', 'TRUNKLINE_CTL': f'{options.bin}/trunklinectl'}


def run_feature(options, feature, place, venv, postgres):
    """One feature in a copy of the checkout; its scenarios as (name, verdict, first step that did not pass)."""
    home = place / feature
    source = home / 'src'
    shutil.copytree(options.patroni, source, ignore=shutil.ignore_patterns('.git', 'data', 'output'))
    command = ['timeout', '--foreground', '-k', '60', str(LIMIT), f'{venv}/bin/python', '-u', str(options.script), 'one', feature]
    if os.geteuid() == 0:
        subprocess.run(['chown', '-R', f'{options.user}:', home], check=True)
        user = ['setpriv', '--reuid', options.user, '--regid', options.user, '--init-groups', '--inh-caps=-all']
        inside = ['bash', '-c', 'ip link set lo up; "$@"; exit $?', '-', *user, *command]
        command = ['unshare', '--net', '--pid', '--mount-proc', '--fork', '--kill-child', *inside]
    with open(home / 'stdout.txt', 'wb') as out:
        subprocess.run(command, cwd=source, env=environment(options, str(home), venv, postgres), stdin=subprocess.DEVNULL,
                       stdout=out, stderr=subprocess.STDOUT, check=False)
    verdicts = read(source / 'result.json', options.patroni / 'features' / f'{feature}.feature')
    if options.out:
        kept = pathlib.Path(options.out) / feature
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for name in ('result.json', 'steps.txt'):
            if (source / name).exists():
                shutil.copy(source / name, kept)
        shutil.copy(home / 'stdout.txt', kept)
        if (source / 'features/output').exists():
            shutil.copytree(source / 'features/output', kept / 'logs')
    shutil.rmtree(home, ignore_errors=True)
    print(f'{feature}: {sum(v == "passed" for _, v, _ in verdicts)} of {len(verdicts)}', file=sys.stderr)
    return verdicts


def read(report, feature_file):
    try:
        feature = json.loads(report.read_text())[0]
    except (OSError, ValueError, IndexError):
        feature = {'status': 'no report', 'elements': []}
    verdicts = []
    for scenario in (e for e in feature.get('elements', ()) if e['type'] == 'scenario'):
        bad = next((s['name'] for s in scenario['steps'] if s.get('result', {}).get('status') != 'passed'), '')
        verdict = scenario['status'] if scenario['status'] in ('passed', 'skipped') else 'failed'
        verdicts.append((scenario['name'], verdict, bad))
    written = sum(line.strip().startswith('Scenario:') for line in feature_file.read_text().splitlines())
    verdicts += [('(not reached)', 'failed', '')] * (written - len(verdicts))
    if feature['status'] in ('hook_error', 'error') and all(v != 'failed' for _, v, _ in verdicts):
        verdicts.append(('(the check of the logs afterwards)', 'failed', ''))
    return verdicts


def run(options):
    options.patroni = pathlib.Path(options.patroni).resolve()
    features = options.features or sorted(f.stem for f in (options.patroni / 'features').glob('*.feature'))
    postgres = sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin'), key=lambda p: int(p.parent.name))
    postgres = str(postgres[-1]) if postgres else os.path.dirname(shutil.which('postgres') or '')
    venv = pathlib.Path(options.venv)
    if not (venv / 'bin/behave').exists():
        subprocess.run(['/usr/bin/python3', '-m', 'venv', venv], check=True)
        subprocess.run([venv / 'bin/pip', 'install', '-q', '--disable-pip-version-check', *PACKAGES], check=True)
    # Short: the path of a unix socket has room for 107 characters.
    with tempfile.TemporaryDirectory(prefix='tb', dir='/tmp') as place:
        place = pathlib.Path(place)
        place.chmod(0o755)
        # Copies, because what lies below /root is out of that user's reach.
        options.bin = place / 'bin'
        options.bin.mkdir()
        for program, name in ((options.agent, 'trunkline-agent'), (options.ctl, 'trunklinectl')):
            shutil.copy(program, options.bin / name)
            (options.bin / name).chmod(0o755)
        options.script = place / 'suite.py'
        shutil.copy(HERE, options.script)
        options.script.chmod(0o755)
        jobs = options.jobs if os.geteuid() == 0 else 1
        with ThreadPoolExecutor(jobs) as pool:
            results = pool.map(lambda f: (f, run_feature(options, f, place, venv, postgres)), features)
            results = list(results)
    total = [0, 0, 0]
    print(f'{"feature":<24}{"passed":>8}{"failed":>8}{"skipped":>9}')
    for feature, verdicts in results:
        row = [sum(v == kind for _, v, _ in verdicts) for kind in ('passed', 'failed', 'skipped')]
        total = [a + b for a, b in zip(total, row)]
        print(f'{feature:<24}{row[0]:>8}{row[1]:>8}{row[2]:>9}')
    print(f'{"total":<24}{total[0]:>8}{total[1]:>8}{total[2]:>9}')
    for feature, verdicts in results:
        for name, verdict, step in verdicts:
            if verdict == 'failed':
                print(f'failed: {feature}: {name}: {step}')
    return 1 if total[1] else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('one').add_argument('feature')
    everything = commands.add_parser('run')
    everything.add_argument('--patroni', required=True, help='a checkout of Patroni')
    everything.add_argument('--agent', required=True)
    everything.add_argument('--ctl', required=True)
    everything.add_argument('--jobs', type=int, default=2, help='features at once (root only)')
    everything.add_argument('--out', help='where logs and reports are kept')
    everything.add_argument('--user', default='postgres', help='whom root runs it as')
    everything.add_argument('--venv', default='/var/tmp/trunkline-behave-venv')
    everything.add_argument('--slow', action='store_true', help="the suite's time limits times five, as its authors run it")
    everything.add_argument('features', nargs='*')
    options = parser.parse_args()
    return one(options.feature) if options.command == 'one' else run(options)


if __name__ == '__main__':
    sys.exit(main())
