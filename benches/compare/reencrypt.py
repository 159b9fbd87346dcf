#!/usr/bin/env python3
"""Re-encryption: how fast it is for zones of several sizes, and what it costs clients.

    cargo build --release && python3 benches/compare/reencrypt.py [--size 1024] [--time 5] [--dir DIR] [--binary PATH]

One volume, one server, the software engine in a process of its own. First nobody uses the volume. Then fio does, over NBD, at random
(4 KiB, half reads, depth 8) and in sequence (256 KiB reads, depth 4): without re-encryption, with one of 50 MiB/s, and with one as fast as it
goes, which is begun again until fio ends. With --luks: a LUKS2 container, offline, by us and by cryptsetup in turns (aes-xts-plain64, 512-bit
key; needs no device-mapper). Markdown on standard output; on a shared machine compare the rows of one run. The figures are in
docs/performance.md.
"""
import argparse, json, os, resource, shutil, signal, statistics, subprocess, tempfile, threading, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--size', type=int, default=1024, help='MiB')
ap.add_argument('--time', type=int, default=5, help='seconds a row')
ap.add_argument('--dir', default='/dev/shm', help='where the volume lies; flushing costs nothing in /dev/shm')
ap.add_argument('--binary', default=os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../target/release/inlinecrypt'))
ap.add_argument('--luks', action='store_true', help='LUKS2 containers instead, beside cryptsetup')
ap.add_argument('--rounds', type=int, default=3, help='with --luks: medians of so many')
a = ap.parse_args()
BIN = os.path.abspath(a.binary)
DIR = tempfile.mkdtemp(prefix='reencrypt-', dir=a.dir)
ENV = dict(os.environ, INLINECRYPT_HOME=f'{DIR}/home', XDG_RUNTIME_DIR=DIR)
SOCK, CONTROL, VOLUME = f'{DIR}/s.sock', f'{DIR}/c.sock', f'{DIR}/v.img'

def run(*args, check=True): return subprocess.run([BIN, *args], env=ENV, check=check, capture_output=True, text=True).stdout

def reencrypt(*more):
    began = time.monotonic()
    run('volume', 'reencrypt', '--control', CONTROL, '--remove-old-key', '--progress-json', *more, VOLUME)
    return time.monotonic() - began

def report(): return json.loads(run('status', '--json', '--control', CONTROL))['servers'][0]['volumes'][0]['reencrypt']

def fio(rw, bs, depth):
    out = subprocess.run(['fio', '--output-format=json', '--name=j', '--ioengine=nbd', f'--uri=nbd+unix:///?socket={SOCK}', f'--rw={rw}',
                          f'--bs={bs}', f'--iodepth={depth}', f'--size={a.size}m', '--time_based=1', f'--runtime={a.time}', '--norandommap=1'],
                         capture_output=True, text=True)
    if out.returncode: raise SystemExit(f'fio: {out.stderr[-300:]}')
    job = json.loads(out.stdout[out.stdout.index('{'):])['jobs'][0]
    sides = [job[side] for side in ('read', 'write') if job[side]['total_ios']]
    p = lambda name: max(side['clat_ns']['percentile'][name] for side in sides) / 1e6
    return sum(s['iops'] for s in sides), sum(s['bw_bytes'] for s in sides) / 2**20, p('50.000000'), p('99.000000'), max(s['clat_ns']['max'] for s in sides) / 1e6

def luks():
    """Each way once a round, in turns; the medians of the rounds."""
    cheap = ['--pbkdf-memory', '64', '--pbkdf-parallel', '1', '--pbkdf-force-iterations', '4']
    disk, key = f'{DIR}/disk', f'{DIR}/pass'
    with open(os.open(key, os.O_CREAT | os.O_WRONLY, 0o600), 'w') as file: file.write('a passphrase')
    def ours(*more): run('volume', 'reencrypt', '--offline', '--key-file', key, '--progress-json', *more, disk)
    def theirs(*more):
        subprocess.run(['cryptsetup', 'reencrypt', '-q', '--force-offline-reencrypt', '-d', key, *cheap, *more, disk], check=True, capture_output=True)
    ways = [('inlinecrypt', '1 MiB zones (default)', ours, ()), ('inlinecrypt', '8 MiB zones', ours, ('--zone', '8MiB')),
            ('cryptsetup', 'checksum (default)', theirs, ()), ('cryptsetup', 'journal', theirs, ('--resilience', 'journal')),
            ('cryptsetup', 'none: a crash loses data', theirs, ('--resilience', 'none'))]
    print('| sectors | by | how | MiB/s | CPU, ms per MiB |\n| --- | --- | --- | --- | --- |')
    for sector in ('4096', '512'):
        run('luks', 'create', '--size', f'{a.size}MiB', '--sector-size', sector, '--key-file', key, *cheap, disk)
        with open(disk, 'r+b') as file:  # gives all of it storage
            file.seek(16 << 20)
            for _ in range(a.size): file.write(os.urandom(1 << 20))
        seen = {way: [] for way in ways}
        for _ in range(a.rounds):
            for way in ways:
                before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
                way[2](*way[3])
                took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                seen[way].append((a.size / took, cpu * 1000 / a.size))
        for way, runs in seen.items():
            rate, cpu = (statistics.median(run[column] for run in runs) for column in (0, 1))
            print(f'| {sector} | {way[0]} | {way[1]} | {rate:.0f} | {cpu:.2f} |', flush=True)
        os.remove(disk)

try:
    if a.luks: luks(); raise SystemExit
    run('volume', 'create', '--size', f'{a.size}MiB', VOLUME)
    server = subprocess.Popen([BIN, 'serve', '--nbd', f'unix:{SOCK}', '--control', CONTROL, VOLUME], env=ENV, stdout=subprocess.DEVNULL)
    try:
        while not (os.path.exists(SOCK) and os.path.exists(CONTROL)): time.sleep(0.05)
        reencrypt()  # gives all of it storage
        print('| zone | alone |\n| --- | --- |')
        for zone in ('1MiB', '4MiB', '16MiB', '64MiB'):
            run('volume', 'reencrypt', '--control', CONTROL, '--remove-old-key', '--detach', '--zone', zone, VOLUME)
            first, began = report()['done_bytes'], time.monotonic()
            while (now := report())['state'] != 'done': last, at = now['done_bytes'], time.monotonic(); time.sleep(0.05)
            print(f'| {zone} | {(last - first) / 2**20 / (at - began):.0f} MiB/s |', flush=True)
        print('\n| clients | re-encryption | kIOPS | MiB/s | median | p99 | longest |\n| --- | --- | --- | --- | --- | --- | --- |')
        for name, how in (('random 4 KiB', ('randrw', '4k', 8)), ('sequential 256 KiB reads', ('read', '256k', 4))):
            for label, more in (('none', None), ('1 MiB zones, 50 MiB/s', ['--throttle', '50MiB']), ('1 MiB zones', []), ('4 MiB zones', ['--zone', '4MiB'])):
                over = threading.Event()
                moved = 0
                def work():
                    while not over.is_set():
                        run('volume', 'reencrypt', '--control', CONTROL, '--remove-old-key', '--detach', *more, VOLUME)
                        while report()['state'] != 'done':
                            if over.is_set(): run('volume', 'reencrypt', '--resume', '--throttle', '0', '--control', CONTROL, '--detach', VOLUME, check=False)
                            time.sleep(0.02)
                worker = threading.Thread(target=work)
                if more is not None: worker.start(); time.sleep(0.2)
                iops, rate, median, p99, longest = fio(*how)
                over.set()
                if more is not None: worker.join()
                print(f'| {name} | {label} | {iops / 1000:.1f} | {rate:.0f} | {median:.2f} ms | {p99:.1f} ms | {longest:.0f} ms |', flush=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
finally:
    shutil.rmtree(DIR)
