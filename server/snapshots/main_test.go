package snapshots

import (
	"context"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// childDir is the variable with the data directory that this binary, started again by a test, recovers: a process that can be
// killed.
const childDir = "KEDGE_SNAPSHOTS_TEST_RECOVER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if _, err := (Recovery{DataDir: dir, Node: "two", Log: quiet}).Run(context.Background(), nil, false); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
