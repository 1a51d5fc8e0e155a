#!/bin/bash
# Runs kedge on an emulated machine with only Debian's kernel and busybox, and cuts its power
# repeatedly during writes: acknowledged writes must not be lost, and the pods must run
# again. Each power cut loses the data that the machine's kernel had not written to the
# disk; the disk keeps all data that it has received.
#
# With "upgrades" the power is cut one to three times at random instants of upgrades, in turn to a good version and to
# faulty ones (scripts/e2e/badversion): one of the two versions must run in the end, the right one, and "kedge upgrade" must
# tell which. KEDGE_SEED repeats the instants of an earlier run.
#
# usage: scripts/power-cuts.sh amd64|arm64 CYCLES load|upgrades   (see `make power-cuts`)
set -euo pipefail
cd "$(dirname "$0")/.."
arch=$1
cycles=$2
during=$3
case $during in load | upgrades) ;; *) echo "unsupported scenario $during: use load or upgrades" >&2 && exit 2 ;; esac
case $arch in
amd64) qemu=(qemu-system-x86_64 -M q35 -cpu max) package=qemu-system-x86 console=ttyS0 ;;
arm64) qemu=(qemu-system-aarch64 -M virt -cpu "max,pauth-impdef=on") package=qemu-system-arm console=ttyAMA0 ;;
*) echo "unsupported architecture $arch: use amd64 or arm64" >&2 && exit 2 ;;
esac
kedge=$PWD/bin/kedge # for this machine's architecture
guest=$kedge
[ "$arch" = "$(dpkg --print-architecture)" ] || guest=$kedge-$arch
dir=$PWD/build/machine/$arch
port=17443
commands=17444 # a shell of the machine
seed=${KEDGE_SEED:-$SRANDOM}
RANDOM=$seed
mkdir -p "$dir"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_programs() {
	local missing=()
	command -v "${qemu[0]}" >/dev/null || missing+=("$package" ipxe-qemu)
	command -v cpio >/dev/null || missing+=(cpio)
	command -v depmod >/dev/null || missing+=(kmod)
	command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
	[ "$arch" = "$(dpkg --print-architecture)" ] || as_root dpkg --add-architecture "$arch"
	as_root apt-get update -qq
	[ ${#missing[@]} = 0 ] || as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# make_disk creates the machine's kernel, its initial file system and its disk.
make_disk() {
	local root=$dir/root init=$dir/init debs=$dir/debs version m n=0
	rm -rf "$root" "$init" "$debs" "$dir/disk.img"
	mkdir -p "$root"/{dev,proc,sys,run,tmp,etc/kedge,sbin,root,var/log,usr/bin,var/lib/kedge/images} "$init"/{bin,mod,dev,proc,sys,new} "$debs"
	version=$(apt-cache depends "linux-image-$arch:$arch" | grep -o 'linux-image-[0-9][^: ]*' | head -1)
	(cd "$debs" && apt-get download -qq "$version:$arch" "busybox-static:$arch" 2>/dev/null)
	for m in "$debs"/*.deb; do dpkg-deb -x "$m" "$root"; done
	mv "$root"/boot/vmlinuz-* "$dir/kernel"
	rm -rf "${root:?}/boot"
	version=$(ls "$root/lib/modules")
	rm -rf "$root/lib/modules/$version/kernel/"{sound,drivers/{gpu,media,infiniband,staging,usb,scsi,iio,hid}}
	depmod -b "$root" "$version"
	for m in virtio_pci virtio_blk ext4 virtio_net; do modprobe -S "$version" -d "$root" --show-depends "$m"; done |
		grep -o '/.*\.ko' | awk '!seen[$0]++' | while read -r m; do
		n=$((n + 1))
		cp "$m" "$init/mod/$(printf %02d $n)-$(basename "$m")"
	done
	cp "$root/bin/busybox" "$init/bin/"
	cat >"$init/init" <<-'EOF'
		#!/bin/busybox sh
		/bin/busybox --install -s /bin
		mount -t proc proc /proc
		mount -t sysfs sys /sys
		mount -t devtmpfs dev /dev
		for m in /mod/*.ko; do insmod $m; done
		until [ -b /dev/vda ]; do sleep 0.1; done
		mount -t ext4 /dev/vda /new
		umount /proc /sys
		mount -o move /dev /new/dev
		exec switch_root /new /sbin/init
	EOF
	cat >"$root/sbin/init" <<-'EOF'
		#!/bin/busybox sh
		/bin/busybox --install -s /bin 2>/dev/null
		export PATH=/bin:/sbin:/usr/bin:/usr/local/bin HOME=/root
		mount -t proc proc /proc
		mount -t sysfs sys /sys
		mount -t tmpfs run /run
		mount -t tmpfs tmp /tmp
		mount -t cgroup2 cgroup /sys/fs/cgroup
		hostname machine
		ip link set lo up
		ip link set eth0 up
		ip addr add 10.0.2.15/24 dev eth0
		ip route add default via 10.0.2.2
		echo "booted: $(uname -srm)"
		[ ! -e /sbin/prepare ] || /sbin/prepare
		while :; do
			kedge server --node-name machine --tls-san 127.0.0.1 &
			pid=$!
			until [ -e /etc/kedge/kedge.yaml ]; do sleep 1; done
			echo "kubeconfig: $(base64 /etc/kedge/kedge.yaml | tr -d '\n')"
			wait $pid
			sleep 1
		done
	EOF
	chmod +x "$init/init" "$root/sbin/init"
	ln -s ../bin/busybox "$root/sbin/modprobe" # for modules that the kernel requests
	echo '127.0.0.1 localhost' >"$root/etc/hosts"
	echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
	echo 'nameserver 10.0.2.3' >"$root/etc/resolv.conf"
	if [ "$during" = load ]; then cp "$guest" "$root/usr/bin/kedge"; else add_versions "$root"; fi
	CGO_ENABLED=0 GOARCH=$arch go build -ldflags '-s -w' -o "$dir/probe" ./scripts/e2e/probe
	go run ./scripts/demo -arch "$arch" "$dir/probe" "$root/var/lib/kedge/images/hello.tar"
	(cd "$init" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$dir/initrd"
	truncate -s 4G "$dir/disk.img"
	mkfs.ext4 -q -F -d "$root" "$dir/disk.img"
}

# add_versions adds versions of kedge to the machine: the one under test, the same with another name for its program, which
# must be unpacked anew, and faulty ones. kedge is installed before its first start.
add_versions() {
	local root=$1 versions=$1/opt other=$dir/other separator="" file fault
	mkdir -p "$versions" "$root/usr/local/bin"
	cp "$guest" "$versions/first"
	rm -rf "$other"
	mkdir -p "$other/payload"
	# The bytes are padding of ELF's header.
	cp "build/program/$arch/kedge" "$other/program"
	printf another | dd of="$other/program" bs=1 seek=9 conv=notrunc status=none
	go run ./scripts/pack "$other/program" "$other/payload"
	{
		printf '{"Replace": {'
		for file in "$other/payload"/*; do
			printf '%s"%s": "%s"' "$separator" "$PWD/launcher/payload/$arch/${file##*/}" "$file"
			separator=,
		done
		printf '}}\n'
	} >"$other/overlay.json"
	CGO_ENABLED=0 GOARCH=$arch go build -overlay "$other/overlay.json" -ldflags '-s -w' -o "$versions/second" ./launcher
	CGO_ENABLED=0 GOARCH=$arch go build -ldflags '-s -w' -o "$other/badversion" ./scripts/e2e/badversion
	for fault in '"fault": "panic", "version": "v9.9.9-panic"' '"fault": "convert", "version": "v9.9.9-convert", "dataFormat": 2'; do
		{
			cat "$other/badversion"
			printf '\n{"real": "/opt/first", "dataDir": "/var/lib/kedge", %s}' "$fault"
		} >"$versions/$(sed -E 's/.*v9.9.9-([a-z]+).*/\1/' <<<"$fault")"
	done
	chmod +x "$versions"/*
	rm -rf "$other"
	cat >"$root/sbin/prepare" <<-'EOF'
		#!/bin/busybox sh
		nc -ll -p 23 -e /bin/sh &
		[ -e /usr/local/bin/kedge ] || /opt/first install server --node-name=machine --tls-san=127.0.0.1
		# What a power cut has interrupted.
		cd /var/lib/kedge/upgrade 2>/dev/null || exit 0
		state="no trial"
		if [ -s trial.json ]; then state="a trial with $(sed -n 's/.*"count": *\([0-9]*\).*/\1/p' starts.json 2>/dev/null | grep . || echo 0) starts"; fi
		[ ! -s trial.json ] || [ ! -s verdict.json ] || state="$state and the verdict $(grep -o '"proven":[a-z]*' verdict.json)"
		echo "found: $state"
	EOF
	chmod +x "$root/sbin/prepare"
}

machine="" # the process of the emulator
writers=()

power_on() {
	"${qemu[@]}" -smp 2 -m 2048 -accel tcg,thread=multi -display none -monitor none -no-reboot \
		-kernel "$dir/kernel" -initrd "$dir/initrd" -append "console=$console quiet panic=-1" \
		-drive "file=$dir/disk.img,format=raw,if=none,id=disk,cache=writethrough" -device virtio-blk-pci,drive=disk \
		-netdev "user,id=net,hostfwd=tcp:127.0.0.1:$port-10.0.2.15:6443,hostfwd=tcp:127.0.0.1:$commands-10.0.2.15:23" -device virtio-net-pci,netdev=net \
		-serial "file:$dir/console" </dev/null >"$dir/qemu.log" 2>&1 &
	machine=$!
}

pull_plug() {
	kill -KILL "$machine" || true
	wait "$machine" 2>/dev/null || true
	machine=""
}

clean_up() {
	[ -z "$machine" ] || pull_plug
	[ ${#writers[@]} = 0 ] || kill "${writers[@]}" 2>/dev/null || true
	rm -rf "$dir/root" "$dir/init" "$dir/debs" "$dir/disk.img"
}
trap clean_up EXIT

kubectl() { "$kedge" kubectl --kubeconfig "$dir/kubeconfig" --request-timeout=60s "$@"; }

# until_true tries a command once a second for up to five minutes, because the machine is slow.
until_true() {
	local n
	for n in $(seq 300); do
		if "$@" >/dev/null 2>&1; then return; fi
		kill -0 "$machine" 2>/dev/null || { tail -20 "$dir/console" "$dir/qemu.log" && exit 1; }
		sleep 1
	done
	echo "timed out after five minutes: $*" >&2
	tail -20 "$dir/console" >&2
	exit 1
}

fetch_kubeconfig() {
	sed -n 's/^kubeconfig: //p' "$dir/console" | tr -d '\r' | tail -1 | base64 -d 2>/dev/null | sed "s#server: .*#server: https://127.0.0.1:$port#" >"$dir/kubeconfig"
	[ -s "$dir/kubeconfig" ] && kubectl get --raw /readyz
}

answers() { [ "$(kubectl exec deployment/hello -- /hello get http://hello:8088/)" = "Hello from kedge!" ]; }

# write creates objects until its file is removed, and records each acknowledged object.
write() {
	local n=0
	while [ -e "$dir/writing" ]; do
		n=$((n + 1))
		if kubectl create configmap "$1-$n" --from-literal=n=$n >/dev/null 2>&1; then echo "configmap/$1-$n" >>"$dir/acked"; fi
	done
}

# in_machine runs shell commands on the machine and prints what they print.
in_machine() {
	local out
	out=$({
		printf '(%s) 2>&1 </dev/null\necho "status $?"\nexit\n' "$1" >&3
		timeout 120 cat <&3 2>/dev/null
	} 3<>"/dev/tcp/127.0.0.1/$commands") 2>/dev/null || return
	printf '%s\n' "${out%status *}"
	[ "${out##*status }" = 0 ]
}

# all_there fails if an acknowledged write is not there.
all_there() {
	local lost
	kubectl get configmaps -o name | sort >"$dir/there"
	lost=$(sort "$dir/acked" | comm -13 "$dir/there" -)
	[ -z "$lost" ] || { echo "$1: acknowledged writes lost: $lost" >&2 && exit 1; }
}

start_writing() {
	: >"$dir/writing"
	writers=()
	local name
	for name; do write "$name" & writers+=($!); done
}

stop_writing() {
	rm "$dir/writing"
	wait "${writers[@]}"
	writers=()
}

under_load() {
	local cycle
	for cycle in $(seq "$cycles"); do
		start_writing "a$cycle" "b$cycle"
		sleep $((5 + RANDOM % 15))
		pull_plug
		stop_writing
		power_on
		if [ $((cycle % 2)) = 0 ]; then
			sleep $((5 + RANDOM % 20)) # while it starts
			pull_plug
			power_on
		fi
		until_true kubectl get --raw /readyz
		all_there "power cut $cycle"
		until_true answers
		echo "power cut $cycle: none of $(wc -l <"$dir/acked") acknowledged writes is lost, and the application answers"
	done
}

# random_sleep sleeps for a random time of less than some seconds, and says how long.
random_sleep() {
	local ms=$((RANDOM * $1 * 1000 / 32768))
	printf -v slept '%d.%03d' $((ms / 1000)) $((ms % 1000))
	sleep "$slept"
}

hash_of() { in_machine "sha256sum $1" | cut -d' ' -f1; }

# running_hash is the hash of the executable that the running kedge was started from.
# shellcheck disable=SC2016 # the machine expands it
running_hash() {
	in_machine 'sha256sum "$(tr "\0" "\n" </proc/$(cat /run/kedge/kedge.lock)/environ | sed -n "s/^KEDGE_LAUNCHER=//p")"' | cut -d' ' -f1
}

ended_upgrades() { in_machine 'kedge upgrade ls' | grep -c '^2' || true; }

no_trial() { in_machine 'kedge upgrade status' | grep -q 'No upgrade is on trial'; }

# begin_upgrade upgrades to a version and ends kedge, which the machine's init starts again.
begin_upgrade() {
	in_machine "setsid sh -c 'kedge upgrade --file=/opt/$1 --observe=5s --wait=10m && kill \$(cat /run/kedge/kedge.lock)' </dev/null >/dev/console 2>&1 &" >/dev/null
}

# result_is_right looks at what an upgrade to a version has left, from a version with some hash and with some upgrades
# before. It sets result.
result_is_right() {
	local version=$1 before=$2 count=$3 want=$2 now installed running
	until_true no_trial
	until_true kubectl get --raw /readyz
	now=$(ended_upgrades)
	if [ "$now" = "$count" ]; then
		result="it had not begun"
	else
		result=$(in_machine 'kedge upgrade ls' | sed -n 2p | grep -oE ' (upgraded|went back) .*' | sed -E 's/^ //; s/ +-?$//; s/ +/ /g')
		[ "$now" = $((count + 1)) ] || { echo "$version: \"kedge upgrade ls\" has $now upgrades and had $count" >&2 && exit 1; }
	fi
	case $version/$result in
	first/upgraded | second/upgraded) want=$(hash_of "/opt/$version") ;;
	*/"it had not begun" | */"went back "*) ;;
	*) echo "$version: \"kedge upgrade ls\" says \"$result\"" >&2 && exit 1 ;;
	esac
	installed=$(hash_of /usr/local/bin/kedge)
	running=$(running_hash)
	if [ "$installed" != "$want" ] || [ "$running" != "$want" ]; then
		echo "$version: $result, and the installed executable is $installed, the running one $running; want $want" >&2
		in_machine 'kedge upgrade ls; sha256sum /opt/* /var/lib/kedge/previous/* /var/lib/kedge/upgrade/*' >&2
		exit 1
	fi
}

# found_at_start is what the present start of the machine has found of an upgrade.
found_at_start() {
	local found
	found=$(sed -n 's/^found: //p' "$dir/console" | tr -d '\r')
	echo "${found:-not that far}"
}

# reach_stage waits until an upgrade is somewhere: a fixed time after its beginning would be another stage on each machine.
reach_stage() {
	local shown
	case $((RANDOM % 3)) in
	0) stage="the beginning" && return ;;
	1) stage="the end of the checks" shown='The new version is ready' ;;
	2) stage="the first start" shown='the new version is on trial: start 1' ;;
	esac
	until_true grep -q "$shown" "$dir/console"
}

during_upgrades() {
	local cycle cut version before count found times
	declare -A results=()
	echo "the seed of the instants is $seed"
	for cycle in $(seq "$cycles"); do
		before=$(hash_of /usr/local/bin/kedge)
		count=$(ended_upgrades)
		version=second
		[ "$before" != "$(hash_of /opt/second)" ] || version=first
		case $((cycle % 4)) in 2) version=convert ;; 0) version=panic ;; esac
		start_writing "u$cycle"
		begin_upgrade "$version"
		reach_stage
		random_sleep 40
		pull_plug
		stop_writing
		times="$slept s after $stage" found=""
		power_on
		for ((cut = RANDOM % 3; cut > 0; cut--)); do
			random_sleep 60
			pull_plug
			times+=", $slept s after the power-on"
			found+="$(found_at_start); "
			power_on
		done
		until_true fetch_kubeconfig
		result_is_right "$version" "$before" "$count"
		all_there "upgrade $cycle"
		until_true answers
		found+=$(found_at_start)
		echo "upgrade $cycle to $version, power cuts $times: $result"
		echo "  found at the starts: $found; none of $(wc -l <"$dir/acked") acknowledged writes is lost, and the application answers"
		results[${result%%,*}]=$((${results[${result%%,*}]:-0} + 1))
	done
	for result in "${!results[@]}"; do echo "$result: ${results[$result]}"; done
}

install_programs
make_disk
: >"$dir/acked"
power_on
until_true fetch_kubeconfig
grep -a '^booted:' "$dir/console"
until_true kubectl get node machine
kubectl get nodes -o wide
kubectl apply -f scripts/demo/hello.yaml
until_true answers
echo "the application answers"
if [ "$during" = load ]; then under_load; else during_upgrades; fi
