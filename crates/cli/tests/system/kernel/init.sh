#!/bin/busybox sh
# The first process of the machine: loads modules, gives disks their names, runs the steps, and ends the machine.
# Results go to the second serial port, everything else to the console.
/bin/busybox --install -s /bin
export PATH=/prog:/bin HOME=/root DM_DISABLE_UDEV=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
ln -s /proc/self/fd /dev/fd
stty -F /dev/ttyS1 raw -echo
exec 3>/dev/ttyS1

while read -r module; do
    insmod "$module" || echo "the module $module is not taken"
done </modules

mkdir /disk
for device in /sys/block/*; do
    serial=$(cat "$device/serial" 2>/dev/null) || continue
    [ -z "$serial" ] || ln -s "/dev/${device##*/}" "/disk/$serial"
done

# A network of one, for servers on it.
ip link set lo up

while read -r step; do
    echo "begin $step" >&3
    echo "=== $step"
    mkdir -p "/scratch/$step"
    cd "/scratch/$step" || exit
    timeout "$(cat /limit)" sh -eux "/steps/$step" >/tmp/out
    code=$?
    # A last line without its end would hide the mark behind it.
    sed 's/^/|/' /tmp/out >&3
    [ -z "$(tail -c 1 /tmp/out)" ] || echo >&3
    echo "end $code" >&3
done </order

echo "done" >&3
sync
poweroff -f
