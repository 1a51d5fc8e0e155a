package workloads

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestContainerSettings runs one pod a row; its script prints what the kernel or the
// runtime made of the settings.
func TestContainerSettings(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	const userNamespace = "unshare -U true 2>/dev/null && echo made || echo refused"
	status := func(field string) string { return "awk '/^" + field + ":/{print $2}' /proc/self/status" }
	for _, c := range []struct {
		name            string
		spec, container string // fields of each
		script          string
		want            string // all that is printed, with spaces for line breaks
	}{
		{"run-as-user", "securityContext: {runAsUser: 1234, runAsGroup: 2345, supplementalGroups: [3456]},", "", "id -u; id -g; id -G", "1234 2345 2345 3456"},
		{"container-wins-over-pod", "securityContext: {runAsUser: 1234},", "securityContext: {runAsUser: 4321},", "id -u", "4321"},
		// The 14 capabilities that containerd gives, which are all below bit 32.
		{"default-capabilities", "", "", status("CapEff"), "00000000a80425fb"},
		{"drop-all-capabilities", "", "securityContext: {capabilities: {drop: [ALL]}},", status("CapEff"), "0000000000000000"},
		{"add-one-capability", "", "securityContext: {capabilities: {drop: [ALL], add: [NET_ADMIN]}},", status("CapEff"), "0000000000001000"},
		{"default-capabilities-forbid-network", "", "", "ip link set eth0 mtu 1400 2>/dev/null || echo refused", "refused"},
		{"net-admin-allows-network", "", "securityContext: {capabilities: {add: [NET_ADMIN]}},", "ip link set eth0 mtu 1400 && ip link show eth0 | grep -c 'mtu 1400'", "1"},
		{"seccomp-by-default", "", "", status("Seccomp"), "2"},
		{"seccomp-runtime-default", "securityContext: {seccompProfile: {type: RuntimeDefault}},", "", status("Seccomp"), "2"},
		{"seccomp-unconfined", "securityContext: {seccompProfile: {type: Unconfined}},", "", status("Seccomp"), "0"},
		// What the filter forbids and the kernel would not: a user namespace of one's own.
		{"seccomp-by-default-forbids", "", "", userNamespace, "refused"},
		{"seccomp-runtime-default-forbids", "securityContext: {seccompProfile: {type: RuntimeDefault}},", "", userNamespace, "refused"},
		{"seccomp-unconfined-allows", "securityContext: {seccompProfile: {type: Unconfined}},", "", userNamespace, "made"},
		{"privilege-escalation-by-default", "", "", status("NoNewPrivs"), "0"},
		{"no-privilege-escalation", "", "securityContext: {allowPrivilegeEscalation: false},", status("NoNewPrivs"), "1"},
		{"root-is-writable", "", "", "touch /x && echo written", "written"},
		{"read-only-root", "volumes: [{name: v, emptyDir: {}}],", "securityContext: {readOnlyRootFilesystem: true}, volumeMounts: [{name: v, mountPath: /v}],", "touch /x 2>/dev/null || echo refused; touch /v/x && echo written", "refused written"},
		{"unprivileged-mounts-nothing", "", "", "mount -t tmpfs none /etc 2>/dev/null || echo refused", "refused"},
		{"privileged-mounts", "", "securityContext: {privileged: true},", "mount -t tmpfs none /etc && ls /etc | grep -c . || echo mounted", "0 mounted"},
		{"sysctl", "securityContext: {sysctls: [{name: net.ipv4.ip_local_port_range, value: '20000 20100'}]},", "", "cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '", "20000 20100"},
		{"working-directory", "", "workingDir: /proc,", "pwd", "/proc"},
		{"host-aliases", "hostAliases: [{ip: 10.1.2.3, hostnames: [a.test, b.test]}],", "", "grep -c '10.1.2.3.a.test.b.test' /etc/hosts", "1"},
		{"own-host-name", "hostname: chosen, subdomain: sub,", "", "hostname; hostname -f", "chosen chosen.sub." + ns + ".svc.cluster.local"},
		{"own-dns", "dnsPolicy: None, dnsConfig: {nameservers: [192.0.2.7], searches: [x.test], options: [{name: ndots, value: '3'}]},", "", "cat /etc/resolv.conf", "search x.test nameserver 192.0.2.7 options ndots:3"},
		{"own-processes-only", "", "", "cat /proc/1/comm; true", "sh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n.Apply(t, ns, harness.ShellWith(c.name, c.script, c.spec, c.container))
			if got := strings.Join(strings.Fields(n.Output(t, ns, c.name)), " "); got != c.want {
				t.Errorf("printed %q, want %q", got, c.want)
			}
		})
	}
}

// TestCommandAndArgsAgainstEntrypoint uses agnhost, whose image has both ENTRYPOINT
// (/agnhost) and CMD (pause).
func TestCommandAndArgsAgainstEntrypoint(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	for _, c := range []struct{ name, fields, want string }{
		{"args-replace-cmd", "args: [entrypoint-tester, one, two],", "[/agnhost entrypoint-tester one two]"},
		{"command-replaces-both", "command: [/agnhost, entrypoint-tester],", "[/agnhost entrypoint-tester]"},
		{"both", "command: [/agnhost, entrypoint-tester], args: [\"$(WHO)\", \"$$(WHO)\"], env: [{name: WHO, value: me}],", "[/agnhost entrypoint-tester me $(WHO)]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {restartPolicy: Never, containers: [{name: main, image: %q, %s}]}}`, c.name, harness.Agnhost, c.fields))
			if got := n.Output(t, ns, c.name); !strings.Contains(got, c.want) {
				t.Errorf("printed %q, want %q", got, c.want)
			}
		})
	}
	t.Run("neither", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: neither}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q}]}}`, harness.Agnhost))
		n.WaitPod(t, ns, "neither", false)
		if got := n.Kubectl(t, "logs", "-n", ns, "neither"); !strings.Contains(got, "Paused") {
			t.Errorf("the image's own command printed %q", got)
		}
	})
}

func TestRunAsNonRootRefusesRoot(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("root", "id", "securityContext: {runAsNonRoot: true},"))
	harness.Eventually(t, 30*time.Second, func() error {
		pod, err := n.Pod(ns, "root")
		if err != nil {
			return err
		}
		for _, c := range pod.Status.ContainerStatuses {
			if w := c.State.Waiting; w != nil && w.Reason == "CreateContainerConfigError" && strings.Contains(w.Message, "runAsNonRoot") {
				return nil
			}
		}
		return fmt.Errorf("status %+v", pod.Status.ContainerStatuses)
	})
}

func TestNamespacesOfHostAndPod(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	pid := n.Cmd.Process.Pid
	seen := fmt.Sprintf("test -d /proc/%d && tr '\\0' ' ' </proc/%d/cmdline | grep -c -e --node-name=%s || echo hidden", pid, pid, n.Name)
	if got := strings.TrimSpace(n.RunPod(t, ns, "host-pid", seen, "hostPID: true,")); got != "1" {
		t.Errorf("with hostPID kedge is %q", got)
	}
	if got := strings.TrimSpace(n.RunPod(t, ns, "own-pid", seen, "")); got != "hidden" {
		t.Errorf("without hostPID kedge is %q", got)
	}
	address := n.Address(t)
	if got := n.RunPod(t, ns, "host-net", "ip -4 addr show; hostname", "hostNetwork: true,"); !strings.Contains(got, "inet "+address+"/") {
		t.Errorf("with hostNetwork no address %s in\n%s", address, got)
	}
	pod, err := n.Pod(ns, "host-net")
	if err != nil || pod.Status.PodIP != address {
		t.Errorf("with hostNetwork the pod has %s, not %s: %v", pod.Status.PodIP, address, err)
	}
	two := func(name, spec string) string {
		return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {terminationGracePeriodSeconds: 1, %s containers: [
			{name: main, image: %q, command: [sh, -c, "exec sleep 3601"]}, {name: other, image: %q, command: [sh, -c, "exec sleep 3602"]}]}}`, name, spec, harness.Busybox, harness.Busybox)
	}
	n.Apply(t, ns, two("together", "shareProcessNamespace: true,"))
	n.Apply(t, ns, two("apart", ""))
	for name, want := range map[string]string{"together": "1", "apart": "0"} {
		n.WaitPod(t, ns, name, false)
		out := n.Kubectl(t, "exec", "-n", ns, name, "-c", "main", "--", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[s]leep 3602' || true")
		if strings.TrimSpace(out) != want {
			t.Errorf("%s: the other container's process is seen %q times, want %s", name, out, want)
		}
	}
}

// TestHostPort: one pod with a port at every address of the machine, one that only the
// loopback address has, and one for datagrams.
func TestHostPort(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	everywhere, loopback, datagrams := freePort(t, "tcp"), freePort(t, "tcp"), freePort(t, "udp")
	n.Apply(t, ns, harness.ShellWith("web", "probe echo udp :8081 & exec probe serve :8080 by-host-port", "", fmt.Sprintf(
		"ports: [{name: a, containerPort: 8080, hostPort: %d}, {name: b, containerPort: 8080, hostPort: %d, hostIP: 127.0.0.1}, {name: c, containerPort: 8081, hostPort: %d, protocol: UDP}],",
		everywhere, loopback, datagrams)))
	n.WaitPod(t, ns, "web", false)
	url := func(host string, port int) string { return fmt.Sprintf("http://%s:%d/", host, port) }
	asked := []string{url(n.Address(t), everywhere), url("127.0.0.1", everywhere), url("127.0.0.1", loopback)}
	for _, u := range asked {
		harness.Eventually(t, 10*time.Second, func() error { return harness.CheckAnswer(u, "by-host-port") })
	}
	harness.Eventually(t, 10*time.Second, func() error { return echoes(n.Address(t), datagrams) })
	if harness.CheckAnswer(url(n.Address(t), loopback), "by-host-port") == nil {
		t.Errorf("a port of 127.0.0.1 is one of %s too", n.Address(t))
	}
	n.Kubectl(t, "delete", "pod", "-n", ns, "web", "--wait")
	harness.Eventually(t, 10*time.Second, func() error {
		for _, u := range asked {
			if harness.CheckAnswer(u, "by-host-port") == nil {
				return fmt.Errorf("%s answers after the pod is gone", u)
			}
		}
		if echoes(n.Address(t), datagrams) == nil {
			return errors.New("datagrams are answered after the pod is gone")
		}
		return nil
	})
}

// freePort is one of the machine that nobody listens at now.
func freePort(t *testing.T, protocol string) int {
	t.Helper()
	if protocol == "udp" {
		c, err := net.ListenUDP("udp", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).Port
	}
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// echoes is nil when a datagram to the port is answered with itself.
func echoes(host string, port int) error {
	c, err := net.Dial("udp", net.JoinHostPort(host, fmt.Sprint(port)))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("there and back")); err != nil {
		return err
	}
	answer := make([]byte, 100)
	length, err := c.Read(answer)
	if err == nil && !strings.Contains(string(answer[:length]), "there and back") {
		err = fmt.Errorf("the answer is %q", answer[:length])
	}
	return err
}
