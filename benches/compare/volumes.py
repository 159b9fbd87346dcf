#!/usr/bin/env python3
"""Many volumes on one server: what an idle one costs in memory, and whether many busy ones together are as fast as one.

    python3 benches/compare/volumes.py [--volumes 1000] [--busy 64] [--time 3] [serve's options ...]

Makes the volumes in /dev/shm (each with a key of its own), serves all of them on one unix socket, and runs fio with 4 KiB
random reads on one volume and on many, in turns. Needs fio and libnbd-bin.
"""
import argparse, json, os, shutil, signal, socket, statistics, subprocess, tempfile, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--volumes', type=int, default=1000)
ap.add_argument('--busy', type=int, default=64)
ap.add_argument('--time', type=int, default=3)
ap.add_argument('--rounds', type=int, default=3)
ap.add_argument('--depth', type=int, default=32, help='requests at once on each busy volume')
ap.add_argument('--bs', default='4k')
a, options = ap.parse_known_args()

here = os.path.dirname(os.path.abspath(__file__))
ours = os.path.join(os.environ.get('CARGO_TARGET_DIR') or os.path.join(here, '../../target'), 'release/inlinecrypt')
place = tempfile.mkdtemp(prefix='volumes-', dir='/dev/shm')
env = dict(os.environ, INLINECRYPT_HOME=os.path.join(place, 'home'))


def resident(pids):
    """Resident KiB of all of them, shared memory counted once each."""
    total = 0
    for pid in pids:
        for line in open(f'/proc/{pid}/smaps_rollup'):
            if line.startswith('Pss:'):
                total += int(line.split()[1])
    return total


def children(pid):
    return [int(x) for x in open(f'/proc/{pid}/task/{pid}/children').read().split()]


def serve(count):
    names = [f'v{i}.img' for i in range(count)]
    sock = os.path.join(place, 's.sock')
    started = time.monotonic()
    server = subprocess.Popen([ours, 'serve', *names, '--nbd', f'unix:{sock}', '--control', 'none', *options], cwd=place, env=env,
                              stdout=subprocess.DEVNULL)
    while True:
        try:
            socket.socket(socket.AF_UNIX).connect(sock)
            break
        except OSError:
            if server.poll() is not None:
                raise SystemExit('the server did not start')
            time.sleep(0.002)
    return server, sock, time.monotonic() - started


def fio(sock, volumes, depth):
    jobs = [f'[v{i}]\nuri=nbd+unix:///v{i}?socket={sock}\n' for i in range(volumes)]
    text = (f'[global]\nioengine=nbd\nrw=randread\nbs={a.bs}\nsize=16m\niodepth={depth}\ntime_based\nruntime={a.time}\nthread\n'
            'group_reporting\n' + ''.join(jobs))
    path = os.path.join(place, 'job.fio')
    open(path, 'w').write(text)
    out = subprocess.run(['fio', '--output-format=json', path], check=True, capture_output=True, text=True).stdout
    return sum(job['read']['iops'] for job in json.loads(out[out.index('{'):])['jobs'])


def stop(server):
    server.send_signal(signal.SIGTERM)
    server.wait(30)


try:
    for i in range(a.volumes):
        subprocess.run([ours, 'volume', 'create', '--size', '16MiB', f'v{i}.img'], cwd=place, env=env, check=True,
                       stdout=subprocess.DEVNULL)
    server, sock, seconds = serve(1)
    print(f'1 volume: serving after {seconds * 1e3:.0f} ms, {resident([server.pid, *children(server.pid)])} KiB')
    one_kib = resident([server.pid, *children(server.pid)])
    stop(server)
    server, sock, seconds = serve(a.volumes)
    all_kib = resident([server.pid, *children(server.pid)])
    print(f'{a.volumes} volumes: serving after {seconds * 1e3:.0f} ms, {all_kib} KiB; '
          f'an idle volume: {(all_kib - one_kib) / (a.volumes - 1):.1f} KiB')
    one, many = [], []
    for _ in range(a.rounds):
        one.append(fio(sock, 1, a.depth))
        many.append(fio(sock, a.busy, a.depth))
    peak = resident([server.pid, *children(server.pid)])
    one, many = statistics.median(one), statistics.median(many)
    print(f'random reads of {a.bs}, {a.depth} at once, on one volume: {one / 1e3:.1f} kIOPS; on each of {a.busy}: '
          f'{many / 1e3:.1f} kIOPS ({many / one:.2f}); then {peak} KiB')
    stop(server)
finally:
    shutil.rmtree(place)
