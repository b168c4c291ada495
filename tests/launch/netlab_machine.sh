#!/bin/bash
# Process 1 of one machine of the lab (netlab.py): sets up file systems and address, starts sshd, then reaps orphans.
#
#   netlab_machine.sh NAME ADDRESS STATE HOME SEEN...
#
# STATE/{home,tmp,hosts,machine_key,authorized_keys} belong to this machine, STATE/../shared to all. SEEN are folders
# of the real machine that stay visible. Runs in its own namespaces, so nothing here touches the real machine.
set -euo pipefail
name=$1 address=$2 state=$3 home=$4
seen=("${@:5}")

hostname "$name"
ip link set lo up
until ip link show eth0 &>/dev/null; do sleep 0.02; done
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add default dev eth0 # leads nowhere; Ray asks the kernel which address it would use to go out

# Folders of the real machine stay visible, read-only, below the mounts that are about to cover them.
declare -A covers=(["$home"]="$state/home" [/tmp]="$state/tmp")
for covered in "${!covers[@]}"; do
    for folder in "${seen[@]}"; do
        [[ $folder == "$covered"/* ]] || continue
        inside=${covers[$covered]}/${folder#"$covered"/}
        mkdir -p "$inside"
        mount --bind "$folder" "$inside"
        mount -o remount,bind,ro "$inside"
    done
done
for folder in "${seen[@]}"; do
    mountpoint -q "$folder" && mount -o remount,bind,ro "$folder"
done
mount --bind "$state/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf # no name server: a look-up fails at once
mount --bind "$state/../shared" /srv
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=64m tmpfs /run
mkdir -m 755 /run/sshd
install -m 600 "$state/machine_key" /run/machine_key
install -m 600 "$state/authorized_keys" /run/authorized_keys
mount --rbind "$state/home" "$home"
cd "$home"
mount --rbind "$state/tmp" /tmp # hides STATE
mount -o remount,bind,ro / # last: what is bound from there stays as writable as it was

if [[ $name != laptop ]]; then
    "$(command -v sshd)" -D -e -f /dev/null \
        -o Port=22 -o ListenAddress="$address" -o HostKey=/run/machine_key -o AuthorizedKeysFile=/run/authorized_keys \
        -o PidFile=none -o UsePAM=no -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password \
        -o StrictModes=no -o MaxStartups=100 -o MaxSessions=100 &
    until (exec 3<>"/dev/tcp/$address/22") 2>/dev/null; do sleep 0.02; done
fi
touch /run/up
while true; do
    sleep 1000 &
    wait $! || true
done
