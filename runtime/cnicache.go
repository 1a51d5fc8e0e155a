package runtime

import (
	"fmt"
	"reflect"

	"github.com/containerd/containerd/v2/cmd/containerd/server"
	"github.com/containerd/go-cni"
	"github.com/containerd/plugin"
	"github.com/containernetworking/cni/libcni"

	"kedge/runtime/unexported"
)

// moveCNICache makes the CNI library store the results of plugins under dir instead of /var/lib/cni. containerd
// has no setting for it, so the function sets unexported fields, four steps from the server to one string:
//
//	server.plugins → the CRI's service → netPlugin → cniConfig → cacheDir
//
// Each step is checked, and TestPodNetworkNamespace checks the result, so that tests fail for a version of
// containerd with other fields.
//
// The CRI begins to recover pods on another goroutine shortly before this call. It reads the string only after
// a request to the shim of a pod, that is later.
func moveCNICache(srv *server.Server, dir string) error {
	service, err := criService(srv)
	if err != nil {
		return err
	}
	networks, err := unexported.Field[map[string]cni.CNI](service, "netPlugin")
	if err != nil {
		return err
	}
	for _, network := range *networks {
		config, err := unexported.Field[libcni.CNI](reflect.ValueOf(network), "cniConfig")
		if err != nil {
			return err
		}
		cache, err := unexported.Field[string](reflect.ValueOf(*config), "cacheDir")
		if err != nil {
			return err
		}
		*cache = dir
	}
	return nil
}

// criService returns the CRI service of a server.
func criService(srv *server.Server) (reflect.Value, error) {
	loaded, err := unexported.Field[[]*plugin.Plugin](reflect.ValueOf(srv), "plugins")
	if err != nil {
		return reflect.Value{}, err
	}
	for _, p := range *loaded {
		if p.Registration.URI() != pluginCRI {
			continue
		}
		instance, err := p.Instance()
		if err != nil {
			return reflect.Value{}, err
		}
		service := reflect.Indirect(reflect.ValueOf(instance)).FieldByName("RuntimeServiceServer")
		if !service.IsValid() {
			return reflect.Value{}, fmt.Errorf("containerd's %T has no field RuntimeServiceServer", instance)
		}
		return service, nil
	}
	return reflect.Value{}, fmt.Errorf("containerd has no plugin %s", pluginCRI)
}
