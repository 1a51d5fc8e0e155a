package network

import (
	"os"
	"path/filepath"
	"testing"

	"kedge/internal/testhost"
	"kedge/network/cni"
	"kedge/network/cniclient"
)

func TestMain(m *testing.M) {
	// The test program is the plugin when it is called by that name, as the
	// kedge executable is.
	if filepath.Base(os.Args[0]) == cni.PluginName {
		os.Exit(cniclient.Main())
	}
	testhost.Main(m)
}
