package kernelnet

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// listAttempts is how often a list is read that changes while the kernel writes it.
const listAttempts = 20

// List returns what list returns, and calls it again if the kernel says that the list changed while it was written: interfaces,
// addresses and routes come and go while pods start and end. After some attempts the error stays.
func List[T any](list func() ([]T, error)) (found []T, err error) {
	for range listAttempts {
		if found, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return found, err
		}
	}
	return found, err
}
