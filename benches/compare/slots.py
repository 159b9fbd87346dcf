#!/usr/bin/env python3
"""Many volumes on few keyslots: throughput, programs a second and the longest wait, for our policy and Linux's.

    cargo build --release && python3 benches/compare/slots.py [--volumes 100] [--time 5]

One server with an ICE model (`ice:next`: a keyslot is held for a whole request, programs come one after the other), one key a
volume, random 4 KiB reads and writes by fio over NBD, one job a volume. Programs take 0, 50 us and 1 ms. Markdown on standard output.
On a shared machine compare the rows of one run. `--slots 128` shows what a keyslot for each key would give. The figures are in
docs/keyslots.md.
"""
import argparse, json, os, shutil, signal, subprocess, tempfile, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--volumes', type=int, default=100)
ap.add_argument('--time', type=int, default=5, help='seconds a row')
ap.add_argument('--slots', default='32,4,1')
ap.add_argument('--latencies', default='0us,50us,1ms')
ap.add_argument('--policies', default='upstream,fair')
a = ap.parse_args()
BIN = os.path.join(os.environ.get('CARGO_TARGET_DIR') or os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../target'), 'release/inlinecrypt')
DIR = tempfile.mkdtemp(prefix='slots-', dir='/dev/shm')
ENV = dict(os.environ, INLINECRYPT_HOME=f'{DIR}/home', XDG_RUNTIME_DIR=DIR)
SOCK, CONTROL = f'{DIR}/s.sock', f'{DIR}/c.sock'

def status():
    out = subprocess.run([BIN, 'status', '--json', '--control', CONTROL], env=ENV, capture_output=True, check=True).stdout
    return json.loads(out)['servers'][0]['engines'][0]['keyslots']

def programs(slots): return sum(slot['programs'] for slot in slots['slots'])

try:
    for n in range(a.volumes):
        with open(f'{DIR}/v{n}.img', 'wb') as f: f.truncate(4 << 20)
        subprocess.run([BIN, 'key', 'generate', '--engine', 'ice:next', '--out', f'{DIR}/v{n}.key'], env=ENV, check=True,
                       stderr=subprocess.DEVNULL)
    jobs = f'[global]\nioengine=nbd\nthread=1\nrw=randrw\nbs=4k\niodepth=4\ntime_based=1\nruntime={a.time}\nsize=4m\nnorandommap=1\ngroup_reporting=1\n'
    jobs += ''.join(f'[v{n}]\nuri=nbd+unix:///v{n}?socket={SOCK}\n' for n in range(a.volumes))
    with open(f'{DIR}/jobs.fio', 'w') as f: f.write(jobs)
    print(f'| keyslots | program takes | policy | kIOPS | programs/s | longest wait |\n| --- | --- | --- | --- | --- | --- |')
    for slots in a.slots.split(','):
        for latency in a.latencies.split(','):
            for policy in a.policies.split(','):
                config = f'[[engine]]\nname = "ice"\nspec = "ice:next,slots={slots},program-latency={latency}"\npolicy = "{policy}"\n'
                config += ''.join(f'[[volume]]\nname = "v{n}"\npath = "v{n}.img"\nkey = "v{n}.key"\n' for n in range(a.volumes))
                config += f'[listen]\nnbd = ["unix:{SOCK}"]\n[server]\ncontrol = "{CONTROL}"\n'
                with open(f'{DIR}/c.toml', 'w') as f: f.write(config)
                server = subprocess.Popen([BIN, 'serve', '--config', f'{DIR}/c.toml'], env=ENV, stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL)
                try:
                    while not (os.path.exists(SOCK) and os.path.exists(CONTROL)): time.sleep(0.05)
                    before = programs(status())
                    fio = subprocess.run(['fio', '--output-format=json', f'{DIR}/jobs.fio'], capture_output=True, text=True)
                    after = status()
                    if fio.returncode: raise SystemExit(f'fio: {fio.stderr[-300:]}')
                    job = json.loads(fio.stdout[fio.stdout.index('{'):])['jobs'][0]
                    iops = job['read']['iops'] + job['write']['iops']
                    rate = (programs(after) - before) / a.time
                    print(f"| {slots} | {latency} | {policy} | {iops / 1000:.1f} | {rate:.0f} | {after['longest_wait_us'] / 1000:.1f} ms |", flush=True)
                finally:
                    server.send_signal(signal.SIGTERM)
                    server.wait()
finally:
    shutil.rmtree(DIR)
