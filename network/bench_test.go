package network

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"kedge/network/cni"
)

// BenchmarkAttach measures the container runtime's wait: one request through the socket,
// without the start of the plugin.
func BenchmarkAttach(b *testing.B) {
	for name, ports := range map[string][]port{
		"plain":         nil,
		"host-port":     {{8000, 80, "TCP", ""}},
		"host-port-udp": {{8000, 80, "UDP", ""}},
	} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, dualStack()...)
			var adds, dels time.Duration
			for b.Loop() {
				p := &pod{w: w, id: "bench", ns: w.namespace()}
				start := time.Now()
				if _, err := p.call("ADD", ports...); err != nil {
					b.Fatal(err)
				}
				adds += time.Since(start)
				start = time.Now()
				if _, err := p.call("DEL"); err != nil {
					b.Fatal(err)
				}
				dels += time.Since(start)
				p.ns.Close()
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(adds.Microseconds())/float64(b.N), "µs-add")
			b.ReportMetric(float64(dels.Microseconds())/float64(b.N), "µs-del")
		})
	}
}

// BenchmarkPlugin measures the start of the plugin, as small as the test
// program is. KEDGE names an executable to measure instead.
func BenchmarkPlugin(b *testing.B) {
	exe := os.Getenv("KEDGE")
	if exe == "" {
		var err error
		if exe, err = os.Executable(); err != nil {
			b.Fatal(err)
		}
	}
	plugin := filepath.Join(b.TempDir(), cni.PluginName)
	if err := os.Symlink(exe, plugin); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		cmd := exec.Command(plugin)
		cmd.Env = []string{"CNI_COMMAND=VERSION"}
		in, err := cmd.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		go func() { in.Write([]byte(`{"cniVersion":"1.0.0"}`)); in.Close() }()
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
}
