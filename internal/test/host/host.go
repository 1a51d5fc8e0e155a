package host

import (
	"os"
	"testing"

	"kedge/internal/namespaces"
	"kedge/throwaway/lan"
)

// LAN and Host are those of package throwaway/lan.
type (
	LAN  = lan.LAN
	Host = lan.Host
)

// Uplink is the name of the interface that joins a host to the switch.
const Uplink = lan.Uplink

// NewLAN creates a switch without hosts. Close removes it and its hosts; when the
// test ends in any other way, the kernel does.
func NewLAN() (*LAN, error) { return lan.New() }

// RequireRoot skips the test unless it may create network namespaces.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: creates network namespaces")
	}
	ns, err := namespaces.NewNetwork()
	if err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	ns.Close()
}
