package peers

import (
	"net/netip"
	"strings"
	"testing"
)

func TestConfigValidate(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("a store that stays alone: %v", err)
	}
	bad := Config{Port: loopbackPort, CAFile: "ca.crt", Addresses: []netip.Addr{netip.IPv4Unspecified()}}
	err := bad.Validate()
	for _, want := range []string{"CA certificate", "peer certificate", "peer key", "2378", "0.0.0.0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not reported in: %v", want, err)
		}
	}
}
