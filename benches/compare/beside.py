#!/usr/bin/env python3
"""What a busy server leaves to others on the same CPUs: our engine in its usual process, at real-time priority, and in the server.

    python3 benches/compare/beside.py [--rounds 3] [--time 2]

The volume is in /dev/shm, and fio reads it with two connections. Beside that, in turns: one process that computes for each CPU (how
much do they get done, of what they do alone), and one that sleeps a millisecond at a time (how late is it woken). Last, two
loops for ever at that priority, and what the processes get done beside them. Each in a session of its own, as services are.
Needs fio and chrt, and the right to real-time priority.
"""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--rounds', type=int, default=3)
ap.add_argument('--time', type=int, default=2, help='seconds of each load')
a = ap.parse_args()

here = os.path.dirname(os.path.abspath(__file__))
ours = os.path.join(os.environ.get('CARGO_TARGET_DIR') or os.path.join(here, '../../target'), 'release/inlinecrypt')
place = tempfile.mkdtemp(prefix='beside-', dir='/dev/shm')
env = dict(os.environ, INLINECRYPT_HOME=os.path.join(place, 'home'))
SERVERS = {'isolated': [], 'realtime': ['--engine-realtime'], 'in-process': ['--engine-process', 'none']}
LOADS = {'1 MiB reads, depth 16': ('read', '1M', 16), 'random 4 KiB reads, depth 32': ('randread', '4k', 32)}

COMPUTES = '''
import os, signal, sys
done = 0
def tell(*_):
    print(done, flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, tell)
print(flush=True)
while True:
    x = 0
    for i in range(1000): x += i
    done += 1
'''
SLEEPS = '''
import sys, time
late, end = [], time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    due = time.monotonic_ns() + 1_000_000
    time.sleep(0.001)
    late.append((time.monotonic_ns() - due) / 1000)
late.sort()
print(late[len(late) // 2], late[len(late) * 99 // 100])
'''


def start(*command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def computed(work):
    """How often the computing processes got round in a second while `work` ran, and what that returned."""
    processes = [start(sys.executable, '-c', COMPUTES) for _ in range(os.cpu_count())]
    for process in processes: process.stdout.readline()
    began = time.monotonic()
    result = work()
    for process in processes: process.terminate()
    seconds = time.monotonic() - began
    return sum(int(process.communicate()[0]) for process in processes) / seconds, result


def fio(socket, rw, bs, depth):
    command = ['fio', '--name=j', '--ioengine=nbd', f'--uri=nbd+unix:///?socket={socket}', '--thread=1', '--size=256M', f'--rw={rw}',
               f'--bs={bs}', f'--iodepth={depth}', '--numjobs=2', '--group_reporting', '--time_based', f'--runtime={a.time}',
               '--norandommap', '--output-format=json']
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(said[said.index('{'):])['jobs'][0]['read']['bw_bytes'] / 1e6


def endless():
    """Two loops for ever at real-time priority, one for each CPU, while the others compute."""
    loops = [start('taskset', '-c', str(cpu), 'chrt', '-r', '1', 'timeout', '4', 'sh', '-c', 'while :; do :; done')
             for cpu in range(os.cpu_count())]
    time.sleep(3)
    return loops


rows = {}
try:
    image = os.path.join(place, 'v.img')
    alone = computed(lambda: time.sleep(2))[0]
    print(f'alone, {os.cpu_count()} processes get round {alone:.0f} times a second')
    for index in range(a.rounds):
        for name, options in SERVERS.items():
            socket = os.path.join(place, f'{index}-{name}.sock')
            create = [] if os.path.exists(image) else ['--create', '512MiB']
            server = subprocess.Popen([ours, 'serve', *create, image, '--nbd', f'unix:{socket}', '--control', 'none', *options],
                                      env=env, stdout=subprocess.DEVNULL, start_new_session=True)
            while not os.path.exists(socket):
                assert server.poll() is None, 'the server did not start'
                time.sleep(0.02)
            if create:   # every page is there before anything is measured
                subprocess.run(['fio', '--name=j', '--ioengine=nbd', f'--uri=nbd+unix:///?socket={socket}', '--thread=1', '--size=512M',
                                '--rw=write', '--bs=1M', '--iodepth=16'], stdout=subprocess.DEVNULL, check=True)
            for load, (rw, bs, depth) in LOADS.items():
                sleeper = start(sys.executable, '-c', SLEEPS, str(a.time))
                fio(socket, rw, bs, depth)
                late = [float(us) for us in sleeper.communicate()[0].split()]
                share, rate = computed(lambda: fio(socket, rw, bs, depth))
                rows.setdefault((load, name), []).append((share / alone * 100, rate, *late))
            server.terminate()
            server.wait()
    print(f"{'load':30} {'server':12} {'they %':>8} {'MB/s':>8} {'late us':>8} {'99 %':>8}")
    for (load, name), all in rows.items():
        print(f'{load:30} {name:12} ' + ' '.join(f'{statistics.median(column):8.0f}' for column in zip(*all)))
    share, loops = computed(endless)
    print(f'beside loops without end at real-time priority: {share / alone * 100:.1f} %')
    for loop in loops: loop.wait()
finally:
    shutil.rmtree(place)
