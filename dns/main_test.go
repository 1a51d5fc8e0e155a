package dns

import (
	"testing"

	"go.uber.org/goleak"

	testhost "kedge/internal/test/host"
)

func TestMain(m *testing.M) {
	testhost.Isolate()
	goleak.VerifyTestMain(m)
}
