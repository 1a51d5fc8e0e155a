package policy

import (
	"testing"

	"kedge/internal/testhost"
)

func TestMain(m *testing.M) { testhost.Main(m) }
