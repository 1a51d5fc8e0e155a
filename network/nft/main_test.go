package nft

import (
	"testing"

	"go.uber.org/goleak"

	"kedge/internal/test/host"
)

func TestMain(m *testing.M) {
	host.Isolate()
	goleak.VerifyTestMain(m)
}
