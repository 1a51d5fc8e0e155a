package external

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if config := os.Getenv(etcdVariable); config != "" {
		fmt.Fprintln(os.Stderr, "etcd:", runEtcd(config))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}
