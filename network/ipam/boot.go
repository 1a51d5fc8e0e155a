package ipam

import (
	"bytes"
	"fmt"
	"os"
)

// BootID returns the identity of the running kernel, which is unique for each boot of each
// machine.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot identity: %w", err)
	}
	return string(bytes.TrimSpace(id)), nil
}
