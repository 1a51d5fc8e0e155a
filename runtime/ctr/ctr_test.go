package ctr

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestAddress wants ctr to look at the given node and not at upstream's default.
func TestAddress(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	err := Run(t.Context(), socket, []string{"--connect-timeout", "100ms", "images", "ls"})
	if err == nil || !strings.Contains(err.Error(), socket) {
		t.Errorf("error is %v, want one about %s", err, socket)
	}
}
