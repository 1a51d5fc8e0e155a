package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"kedge/internal/cgroup"
	"kedge/internal/kernelnet"
	"kedge/internal/mounts"
	"kedge/internal/pki"
)

// Names of the kernel objects of the plain composition.
const (
	plainCgroup  = "/kbench-plain"
	plainBridge  = "kbench0"
	plainNetwork = "kbench"
)

// plainNode is Kubernetes with its upstream components on one machine, without tuning: a control plane process
// with etcd over TCP (see plain/control), upstream's kubelet, upstream's containerd with the same shim and runc
// as kedge, and the reference CNI plugins. The kubelet is started when the API is ready, as a unit file would
// do; otherwise it would wait longer after its first refused connections. There is one server, so leader
// election is off, as in kedge.
type plainNode struct {
	o   options
	dir string
	ip  netip.Addr

	group string // cgroup in which all three processes start

	hadKubeletDir bool // the folder of an earlier kubelet exists, and must not be removed

	control, containerd *process

	mu      sync.Mutex
	kubelet *process
	late    error // the reason why the kubelet could not be started
	waiting sync.WaitGroup
	cancel  context.CancelFunc
}

func newPlain(o options) *plainNode { return &plainNode{o: o, dir: filepath.Join(o.dir, "p")} }

func (p *plainNode) name() string               { return "plain" }
func (p *plainNode) path(name string) string    { return filepath.Join(p.dir, name) }
func (p *plainNode) tool(name string) string    { return filepath.Join(p.o.plain, name) }
func (p *plainNode) socket() string             { return p.path("run/containerd.sock") }
func (p *plainNode) port(n int) int             { return p.o.port + n }
func (p *plainNode) tlsFile(name string) string { return filepath.Join(p.dir, "tls", name) }
func (p *plainNode) url() string                { return fmt.Sprintf("https://127.0.0.1:%d", p.o.port) }

func (p *plainNode) client() (*kubernetes.Clientset, error) {
	return clientFrom(p.path("admin.kubeconfig"))
}

func (p *plainNode) startIn(group string) { p.group = group }

func (p *plainNode) tail(lines int) string {
	var out strings.Builder
	for _, log := range []string{"control.log", "containerd.log", "kubelet.log"} {
		fmt.Fprintf(&out, "--- %s\n%s\n", log, tailOf(p.path(log), lines))
	}
	return out.String()
}

func (p *plainNode) prepare(ctx context.Context, images string) error {
	addrs, err := kernelnet.FindAddresses(true, false, nil)
	if err != nil {
		return err
	}
	p.ip = addrs[0]
	_, err = os.Stat("/var/lib/kubelet")
	p.hadKubeletDir = err == nil
	for _, d := range []string{"tls", "run", "cni", "tmp"} {
		if err := os.MkdirAll(p.path(d), 0o700); err != nil {
			return err
		}
	}
	if err := cgroup.EnsureGroup(plainCgroup); err != nil {
		return err
	}
	if err := p.identity(); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"containerd.toml": p.containerdConfig(), "kubelet.yaml": p.kubeletConfig(), "cni/10-bench.conflist": p.cniConfig(),
	} {
		if err := os.WriteFile(p.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	settings, err := json.MarshalIndent(p.controlSettings(), "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.path("control.json"), settings, 0o600); err != nil {
		return err
	}
	return p.importImages(ctx, images)
}

// identity creates the certificates and kubeconfigs, like an installer.
func (p *plainNode) identity() error {
	now := time.Now()
	dir := p.path("tls")
	ca, err := pki.EnsureAuthority(dir, "ca", now)
	if err != nil {
		return err
	}
	proxyCA, err := pki.EnsureAuthority(dir, "front-proxy-ca", now)
	if err != nil {
		return err
	}
	if _, err := pki.EnsureKey(p.tlsFile("sa.key")); err != nil {
		return err
	}
	ips := []net.IP{net.IPv4(127, 0, 0, 1), p.ip.AsSlice(), net.IPv4(10, 247, 0, 1)}
	for _, l := range []struct {
		ca   *pki.Authority
		name string
		leaf pki.Leaf
	}{
		{ca, "apiserver", pki.Leaf{CommonName: "kube-apiserver", DNSNames: []string{"localhost", "kubernetes.default.svc"}, IPs: ips, Server: true}},
		{ca, "kubelet-serving", pki.Leaf{CommonName: "system:node:bench", Organizations: []string{"system:nodes"}, DNSNames: []string{"bench"}, IPs: ips, Server: true}},
		{ca, "apiserver-kubelet-client", pki.Leaf{CommonName: "kube-apiserver-kubelet-client", Organizations: []string{"system:masters"}, Client: true}},
		{proxyCA, "front-proxy-client", pki.Leaf{CommonName: "front-proxy-client", Client: true}},
		{ca, "admin", pki.Leaf{CommonName: "admin", Organizations: []string{"system:masters"}, Client: true}},
		{ca, "controllers", pki.Leaf{CommonName: "system:kube-controller-manager", Client: true}},
		{ca, "scheduler", pki.Leaf{CommonName: "system:kube-scheduler", Client: true}},
		{ca, "kubelet", pki.Leaf{CommonName: "system:node:bench", Organizations: []string{"system:nodes"}, Client: true}},
	} {
		if _, err := l.ca.EnsureLeaf(dir, l.name, l.leaf, now); err != nil {
			return err
		}
	}
	for _, user := range []string{"admin", "controllers", "scheduler", "kubelet"} {
		cfg := clientcmdapi.NewConfig()
		cfg.Clusters["bench"] = &clientcmdapi.Cluster{Server: p.url(), CertificateAuthority: ca.CertFile()}
		cfg.AuthInfos["bench"] = &clientcmdapi.AuthInfo{ClientCertificate: p.tlsFile(user + ".crt"), ClientKey: p.tlsFile(user + ".key")}
		cfg.Contexts["bench"] = &clientcmdapi.Context{Cluster: "bench", AuthInfo: "bench"}
		cfg.CurrentContext = "bench"
		if err := clientcmd.WriteToFile(*cfg, p.path(user+".kubeconfig")); err != nil {
			return err
		}
	}
	return nil
}

// importImages imports images into containerd's store and stops containerd again.
func (p *plainNode) importImages(ctx context.Context, images string) (err error) {
	if err := p.startContainerd(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.containerd.end()) }()
	if err := p.waitContainerd(ctx); err != nil {
		return err
	}
	// The plugins behind the socket may be ready a moment later.
	var out []byte
	for range 20 {
		if out, err = exec.CommandContext(ctx, p.tool("ctr"), "--address", p.socket(), "--namespace", "k8s.io", "images", "import", images).CombinedOutput(); err == nil {
			return nil
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("import the images: %w\n%s", err, out)
}

func (p *plainNode) startContainerd() error {
	var err error
	// containerd looks for the shim in PATH.
	env := []string{"PATH=" + p.o.payload + ":" + os.Getenv("PATH"), "TMPDIR=" + p.path("tmp")}
	p.containerd, err = launch(p.path("containerd.log"), p.group, env, p.tool("containerd"), "--config", p.path("containerd.toml"))
	return err
}

func (p *plainNode) waitContainerd(ctx context.Context) error {
	for {
		c, err := net.Dial("unix", p.socket())
		if err == nil {
			return c.Close()
		}
		if err := p.containerd.failed(); err != nil {
			return err
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

func (p *plainNode) start(ctx context.Context) error {
	var err error
	if p.control, err = launch(p.path("control.log"), p.group, nil, p.tool("control"), p.path("control.json")); err != nil {
		return err
	}
	if err := p.startContainerd(); err != nil {
		return err
	}
	p.mu.Lock()
	p.kubelet, p.late = nil, nil
	p.mu.Unlock()
	ctx, p.cancel = context.WithCancel(ctx)
	p.waiting.Go(func() {
		k, err := p.startKubelet(ctx)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.kubelet, p.late = k, err
	})
	return nil
}

// startKubelet waits for the components that the kubelet needs, and starts it.
func (p *plainNode) startKubelet(ctx context.Context) (*process, error) {
	if err := p.waitContainerd(ctx); err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	for {
		if resp, err := client.Get(p.url() + "/readyz"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		if err := p.control.failed(); err != nil {
			return nil, err
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return launch(p.path("kubelet.log"), p.group, nil, p.tool("kubelet"), "--config="+p.path("kubelet.yaml"), "--kubeconfig="+p.path("kubelet.kubeconfig"),
		"--root-dir="+p.path("kubelet"), "--cert-dir="+p.path("kubelet-pki"), "--hostname-override=bench", "--node-ip="+p.ip.String())
}

func (p *plainNode) running() []*process {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*process
	for _, q := range []*process{p.kubelet, p.control, p.containerd} {
		if q != nil {
			out = append(out, q)
		}
	}
	return out
}

func (p *plainNode) processes() []int {
	var out []int
	for _, q := range p.running() {
		out = append(out, q.cmd.Process.Pid)
	}
	return out
}

func (p *plainNode) failed() error {
	p.mu.Lock()
	late := p.late
	p.mu.Unlock()
	for _, q := range p.running() {
		late = errors.Join(late, q.failed())
	}
	return late
}

func (p *plainNode) stop() error {
	if p.cancel != nil {
		p.cancel()
	}
	p.waiting.Wait()
	var errs []error
	for _, q := range p.running() {
		errs = append(errs, q.end())
	}
	return errors.Join(errs...)
}

func (p *plainNode) remove() error {
	if _, err := os.Stat(p.dir); err != nil {
		return nil
	}
	errs := []error{p.stop()}
	for _, pid := range below(p.dir) { // shims
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	errs = append(errs, cgroup.Clear(plainCgroup), mounts.DetachBelow(p.dir))
	if link, err := netlink.LinkByName(plainBridge); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	// The paths of these folders are fixed.
	cached, _ := filepath.Glob("/var/lib/cni/results/" + plainNetwork + "-*")
	logs, _ := filepath.Glob("/var/log/containers/*.log")
	for _, l := range logs {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, p.dir+"/") {
			cached = append(cached, l)
		}
	}
	for _, f := range cached {
		errs = append(errs, os.Remove(f))
	}
	if !p.hadKubeletDir {
		errs = append(errs, os.RemoveAll("/var/lib/kubelet"))
	}
	for _, log := range []string{"control.log", "containerd.log", "kubelet.log"} {
		if err := appendFile(p.o.keepLog, p.path(log)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}

func (p *plainNode) sizes(r *report) error {
	var sum int64
	for _, path := range []string{
		p.tool("control"), p.tool("kubelet"), p.tool("containerd"), p.tool("bridge"), p.tool("host-local"), p.tool("loopback"), p.tool("portmap"),
		filepath.Join(p.o.payload, "containerd-shim-runc-v2"), filepath.Join(p.o.payload, "runc"),
	} {
		st, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("run make bench-plain: %w", err)
		}
		sum += st.Size()
	}
	r.add(figure{"executables", "MB"}, p.name(), float64(sum)/1e6)
	return nil
}

// mayLowerOOMScore is false on nested machines; containerd must be configured for that.
func mayLowerOOMScore() bool {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return true
	}
	for line := range bytes.Lines(data) {
		var caps uint64
		if n, _ := fmt.Sscanf(string(line), "CapEff: %x", &caps); n == 1 {
			return caps&(1<<24) != 0 // CAP_SYS_RESOURCE
		}
	}
	return true
}
