package appliance

import (
	"archive/tar"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"kedge/scripts/e2e/harness"
)

// TestBesideDocker: Debian's Docker runs containers before, during and after an installation of kedge. Their processes,
// networks and packet filter rules stay as they are, and they answer all the time.
func TestBesideDocker(t *testing.T) {
	s := onSystemdMachine(t)
	s.neverUsed()
	d := startDocker(s)
	d.same("before kedge")
	s.importedByKedge()
	out := s.kedge(0, "install", "server", "--wait=20m")
	d.same("after the installation")
	// Docker has made the kernel drop what is forwarded and is not its own. The installation says so and what to do, and is
	// complete nevertheless.
	if !strings.Contains(out, "kedge: warning: network: a firewall is in the way of pods: chain FORWARD") || !strings.Contains(out, "server machine is ready") {
		t.Errorf("the installation prints\n%s", out)
	}
	remedies := regexp.MustCompile(`iptables (-I DOCKER-USER -[io] kdg\S+ -j ACCEPT)`)
	lines := remedies.FindAllStringSubmatch(out, -1)
	if doctor := s.kedge(3, "doctor"); !remedies.MatchString(doctor) || len(lines) != 2 {
		t.Fatalf("no remedy; the doctor says\n%s", doctor)
	}
	for _, line := range lines {
		s.must("iptables", strings.Fields(line[1])...)
	}
	if doctor := s.kedge(0, "doctor"); strings.Contains(doctor, "DOCKER-USER") {
		t.Errorf("after the remedy the doctor says\n%s", doctor)
	}
	d.before = d.state()
	s.podsBesideDocker(d)
	d.same("with pods")

	// Docker's life goes on.
	d.docker("run", "--detach", "--name=late", "--publish=8092:8080", dockerImage, "serve", ":8080", "late")
	d.answers("http://127.0.0.1:8092/", "late")
	d.docker("rm", "--force", "late")
	d.same("after a further container")
	s.systemctl("restart") // restarts kedge
	s.kedge(0, "install", "server", "--wait=20m")
	d.same("after a restart of kedge")

	// And kedge's, when Docker is started again, which ends Docker's containers.
	before := s.containers()
	s.must("iptables", "--flush", "DOCKER-USER")
	s.lastingRemedy()
	s.must("systemctl", "restart", "docker")
	d.docker("start", "web", "client")
	if now := s.containers(); now != before {
		t.Errorf("a restart of Docker changes the pods: they were\n%s\nand are\n%s", before, now)
	}
	s.podsAnswer()
	d.before = d.state()

	s.systemctl("stop")
	s.kedge(0, "killall")
	d.same("after killall")
	s.kedge(0, "install", "server", "--wait=20m")
	s.podsAnswer()
	d.same("after kedge has started again")
	if out := s.kedge(0, "uninstall", "--purge"); !strings.HasSuffix(out, "kedge is removed\n") {
		t.Errorf("uninstall: %s", out)
	}
	d.same("after the removal")
}

// dockerImage is the image of Docker's containers, with probe.
const dockerImage = "probe:e2e"

// docker is Docker with two containers on a network of their own, one of which has a published port.
type docker struct {
	systemdMachine
	before map[string]string
}

// startDocker creates the containers.
func startDocker(s systemdMachine) *docker {
	s.Helper()
	d := &docker{systemdMachine: s}
	archive := filepath.Join(s.TempDir(), "probe.tar")
	if err := writeTar(archive, "probe"); err != nil {
		s.Fatal(err)
	}
	s.must("systemctl", "start", "docker")
	d.docker("import", `--change=ENTRYPOINT ["/probe"]`, archive, dockerImage)
	d.docker("network", "create", "back")
	d.docker("run", "--detach", "--name=web", "--network=back", "--publish=8091:8080", "--volume=data:/data", dockerImage, "serve", ":8080", "from docker")
	d.docker("run", "--detach", "--name=client", "--network=back", dockerImage, "serve", ":8080", "client")
	d.before = d.state()
	return d
}

// writeTar writes an archive with a program that was built for the tests.
func writeTar(name, program string) (err error) {
	p, err := harness.BuiltProgram(program)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	if err := w.WriteHeader(&tar.Header{Name: program, Mode: int64(p.Mode), Size: int64(len(p.Data))}); err != nil {
		return err
	}
	_, err = w.Write(p.Data)
	return errors.Join(err, w.Close())
}

func (d *docker) docker(args ...string) string {
	d.Helper()
	return d.must("docker", args...)
}

// state is what must not change: the processes of Docker and of its containers, its networks, and everything of the kernel's
// network that is not kedge's.
func (d *docker) state() map[string]string {
	d.Helper()
	state := map[string]string{
		"daemons":  d.must("systemctl", "show", "--property=Id,MainPID,NRestarts,ActiveState", "docker", "containerd"),
		"iptables": d.must("iptables", "-S") + d.must("iptables", "-t", "nat", "-S"),
	}
	for _, name := range strings.Fields(d.docker("ps", "--all", "--format={{.Names}}")) {
		state["container "+name] = d.docker("inspect", "--format={{json .State}} {{.RestartCount}} {{json .NetworkSettings}} {{json .Mounts}}", name)
	}
	for _, name := range strings.Fields(d.docker("network", "ls", "--format={{.Name}}")) {
		state["network "+name] = d.docker("network", "inspect", name)
	}
	for line := range strings.Lines(d.must("nft", "list", "tables")) {
		if table := strings.Fields(line); !strings.HasPrefix(table[2], "kedge-") { // "table FAMILY NAME"
			// With the handles of rules, which a rule that was written again does not keep.
			state["nftables "+table[1]+" "+table[2]] = d.must("nft", "--stateless", "--handle", "list", "table", table[1], table[2])
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		d.Fatal(err)
	}
	for _, l := range links {
		a := l.Attrs()
		if a.Name != "docker0" && !strings.HasPrefix(a.Name, "br-") && !strings.HasPrefix(a.Name, "veth") {
			continue
		}
		addresses, err := netlink.AddrList(l, netlink.FAMILY_V4) // the kernel adds a link-local one for IPv6, when it likes
		if err != nil {
			d.Fatal(err)
		}
		state["interface "+a.Name] = fmt.Sprint(a.Index, l.Type(), a.MTU, a.MasterIndex, a.OperState, addresses)
	}
	for _, file := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/ipv4/conf/docker0/rp_filter", "/proc/sys/net/ipv4/conf/docker0/route_localnet"} {
		state[file] = harness.FileContent(file)
	}
	return state
}

// same fails if something of Docker has changed, or its containers do not answer.
func (d *docker) same(when string) {
	d.Helper()
	now := d.state()
	for _, name := range slices.Sorted(maps.Keys(now)) {
		if _, was := d.before[name]; !was {
			d.Errorf("%s: %s is new:\n%s", when, name, now[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(d.before)) {
		if now[name] != d.before[name] {
			d.Errorf("%s: %s was\n%s\nand is\n%s", when, name, d.before[name], now[name])
		}
	}
	for _, address := range []string{"127.0.0.1", d.address()} {
		d.answers("http://"+net.JoinHostPort(address, "8091")+"/", "from docker")
	}
	// Between containers, by name, and by the published port.
	for _, url := range []string{"http://web:8080/", "http://" + net.JoinHostPort(d.address(), "8091") + "/"} {
		if out := d.docker("exec", "client", "/probe", "get", url); out != "from docker\n" {
			d.Errorf("%s: %s answers a container %q", when, url, out)
		}
	}
}

// answers fails if a page does not have a text.
func (d *docker) answers(url, text string) {
	d.Helper()
	harness.Eventually(d.T, 10*time.Second, func() error { return harness.CheckAnswer(url, text) })
}

// lastingRemedy is the drop-in of docs/install.md.
func (s systemdMachine) lastingRemedy() {
	s.Helper()
	text, err := os.ReadFile("/kedge/docker.conf") // by scripts/systemd-machine.sh
	const file = "/etc/systemd/system/docker.service.d/kedge.conf"
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, text, 0o644))
	}
	if err != nil {
		s.Fatal(err)
	}
	s.must("systemctl", "daemon-reload")
}

// podsBesideDocker creates pods.
func (s systemdMachine) podsBesideDocker(d *docker) {
	s.Helper()
	s.pod(harness.ShellWith("web", "exec probe serve :8080 'from a pod'", "", "ports: [{containerPort: 8080, hostPort: 8093}],"))
	s.pod(harness.Shell("client", "exec sleep 100000", ""))
	s.apply(`{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}`)
	s.kedge(0, "kubectl", "wait", "--for=condition=Ready", "pod/web", "pod/client", "--timeout=10m")
	s.podsAnswer()
	// From each side to the other.
	if out := s.kedge(0, "kubectl", "exec", "client", "--", "probe", "get", "http://"+net.JoinHostPort(s.address(), "8091")+"/"); out != "from docker\n" {
		s.Errorf("a container answers a pod %q", out)
	}
	ip := strings.TrimSpace(s.kedge(0, "kubectl", "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"))
	for _, url := range []string{"http://" + net.JoinHostPort(s.address(), "8093") + "/", "http://" + ip + "/"} {
		if out := d.docker("exec", "client", "/probe", "get", url); out != "from a pod\n" {
			s.Errorf("%s answers a container of Docker %q", url, out)
		}
	}
}
