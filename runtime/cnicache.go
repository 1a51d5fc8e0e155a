package runtime

import (
	"fmt"
	"reflect"
	"unsafe"

	"github.com/containerd/containerd/v2/cmd/containerd/server"
	"github.com/containerd/go-cni"
	"github.com/containerd/plugin"
	"github.com/containernetworking/cni/libcni"
)

// moveCNICache makes the CNI library remember the results of its plug-ins under dir
// and not under /var/lib/cni, which nothing that containerd offers can do. It goes
// through fields that are not exported, four steps from the server to one string:
//
//	server.plugins → the CRI's service → netPlugin → cniConfig → cacheDir
//
// Each step is checked, and TestPodNetworkNamespace looks at the result, so that a
// new version of containerd that has other fields is noticed before anybody runs it.
//
// The CRI begins to recover pods a moment before this is called, on another
// goroutine, and comes to this string only after asking the shim of a pod.
func moveCNICache(srv *server.Server, dir string) error {
	loaded, err := hidden[[]*plugin.Plugin](reflect.ValueOf(srv), "plugins")
	if err != nil {
		return err
	}
	for _, p := range *loaded {
		if p.Registration.URI() != pluginCRI {
			continue
		}
		instance, err := p.Instance()
		if err != nil {
			return err
		}
		service := reflect.Indirect(reflect.ValueOf(instance)).FieldByName("RuntimeServiceServer")
		if !service.IsValid() {
			return fmt.Errorf("containerd's %T has no field RuntimeServiceServer", instance)
		}
		networks, err := hidden[map[string]cni.CNI](service, "netPlugin")
		if err != nil {
			return err
		}
		for _, network := range *networks {
			config, err := hidden[libcni.CNI](reflect.ValueOf(network), "cniConfig")
			if err != nil {
				return err
			}
			cache, err := hidden[string](reflect.ValueOf(*config), "cacheDir")
			if err != nil {
				return err
			}
			*cache = dir
		}
		return nil
	}
	return fmt.Errorf("containerd has no plugin %s", pluginCRI)
}

// hidden returns the address of a field of the struct that v leads to, if it has the
// type T, exported or not.
func hidden[T any](v reflect.Value, name string) (*T, error) {
	for v.Kind() == reflect.Interface || v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct || !v.CanAddr() {
		return nil, fmt.Errorf("containerd keeps no struct where field %s is looked for, but %s", name, v.Kind())
	}
	f := v.FieldByName(name)
	if want := reflect.TypeFor[T](); !f.IsValid() || f.Type() != want {
		return nil, fmt.Errorf("containerd's %s has no field %s of type %s", v.Type(), name, want)
	}
	return (*T)(unsafe.Pointer(f.UnsafeAddr())), nil
}
