package network

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	testhost "kedge/internal/test/host"
	"kedge/network/cni"
	"kedge/network/cniclient"
)

func TestMain(m *testing.M) {
	// The test program is the plugin when it is called by that name, as the
	// kedge executable is.
	if filepath.Base(os.Args[0]) == cni.PluginName {
		os.Exit(cniclient.Main())
	}
	testhost.Isolate()
	goleak.VerifyTestMain(m)
}
