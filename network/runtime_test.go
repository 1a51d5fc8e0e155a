package network

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// TestContainerRuntime drives the plugin as container runtimes do: through the
// CNI project's own library, the file in net.d and the program in bin.
func TestContainerRuntime(t *testing.T) {
	t.Setenv("GORACE", "atexit_sleep_ms=0") // or each call of the plugin takes a second more under the race detector
	w := newWorld(t, dualStack()...)
	list, err := libcni.ConfListFromFile(filepath.Join(w.cfg.ConfDir(), "10-kedge.conflist"))
	w.must(err)
	runtime := libcni.NewCNIConfigWithCacheDir([]string{w.cfg.BinDir()}, t.TempDir(), nil)
	if _, err := runtime.ValidateNetworkList(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	ns, server := w.namespace(), w.pod()
	rt := &libcni.RuntimeConf{
		ContainerID: "sandbox", NetNS: ns.Path(), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", "web"}},
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{
			{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
			{"hostPort": 0, "containerPort": 81, "protocol": "tcp"},
		}},
	}
	result, err := runtime.AddNetworkList(t.Context(), list, rt)
	w.must(err)
	defer runtime.DelNetworkList(t.Context(), list, rt)
	r, err := types100.GetResult(result)
	w.must(err)
	if len(r.IPs) != 2 || len(r.Interfaces) != 2 || r.Interfaces[1].Sandbox != ns.Path() || len(r.Routes) != 2 {
		t.Fatalf("result: %+v", r)
	}
	w.serve(ns.Do, "tcp", "0.0.0.0:80")
	w.wantSeen("host port", w.outside.Do, "tcp", "192.0.2.1:8080", "192.0.2.9")
	w.serve(server.ns.Do, "tcp", at(server.addrs[0], 80))
	w.wantSeen("pod to pod", ns.Do, "tcp", at(server.addrs[0], 80), r.IPs[0].Address.IP.String())

	w.must(runtime.CheckNetworkList(t.Context(), list, rt))
	w.must(runtime.DelNetworkList(t.Context(), list, rt))
	w.must(runtime.DelNetworkList(t.Context(), list, rt))

	// With the newest version of the specification, which the file does not ask for.
	list.CNIVersion = "1.1.0"
	w.must(runtime.GetStatusNetworkList(t.Context(), list))
	if _, err := runtime.AddNetworkList(t.Context(), list, rt); err != nil {
		t.Fatal(err)
	}
	w.must(runtime.GCNetworkList(t.Context(), list, &libcni.GCArgs{
		ValidAttachments: []types.GCAttachment{{ContainerID: server.id, IfName: "eth0"}},
	}))
	if err := runtime.CheckNetworkList(t.Context(), list, rt); err == nil {
		t.Error("attachment survived GC")
	}
}

func TestPluginWithoutKedge(t *testing.T) {
	w := newWorld(t, podsV4)
	list, err := libcni.ConfListFromFile(filepath.Join(w.cfg.ConfDir(), "10-kedge.conflist"))
	w.must(err)
	w.stop()
	runtime := libcni.NewCNIConfigWithCacheDir([]string{w.cfg.BinDir()}, t.TempDir(), nil)
	_, err = runtime.AddNetworkList(t.Context(), list, &libcni.RuntimeConf{ContainerID: "x", NetNS: w.namespace().Path(), IfName: "eth0"})
	var answer *types.Error
	if err == nil {
		t.Fatal("ADD succeeded")
	}
	if !errors.As(err, &answer) || answer.Code != types.ErrTryAgainLater {
		t.Errorf("ADD without kedge: %v", err)
	}
}
