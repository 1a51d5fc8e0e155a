package network

import (
	"net/netip"
	"strings"
	"testing"
)

func TestValidate(t *testing.T) {
	prefixes := func(texts ...string) (list []netip.Prefix) {
		for _, s := range texts {
			list = append(list, netip.MustParsePrefix(s))
		}
		return list
	}
	for _, c := range []struct {
		name   string
		change func(*Config)
		want   []string // parts of the error; none for a good configuration
	}{
		{"default", func(*Config) {}, nil},
		{"dual stack", func(c *Config) { c.PodCIDRs = prefixes("10.42.0.0/24", "fd42::/64") }, nil},
		{"jumbo", func(c *Config) { c.MTU = 8950 }, nil},
		{"no node name", func(c *Config) { c.NodeName = "" }, []string{"node name"}},
		{"node name with a slash", func(c *Config) { c.NodeName = "a/b" }, []string{"node name"}},
		{"relative directories", func(c *Config) { c.DataDir, c.RunDir = "data", "" }, []string{"data directory", "run directory"}},
		{"socket path too long", func(c *Config) { c.RunDir = "/" + strings.Repeat("r", 100) }, []string{"too long"}},
		{"two ranges of one family", func(c *Config) { c.PodCIDRs = prefixes("10.42.0.0/24", "10.42.1.0/24") }, []string{"the same address family"}},
		{"tiny range", func(c *Config) { c.PodCIDRs = prefixes("10.42.0.0/30") }, []string{"too small"}},
		{"host bits", func(c *Config) { c.PodCIDRs = prefixes("10.42.0.1/24"); c.ClusterCIDRs = prefixes("10.42.0.1/16") }, []string{"pod range", "cluster range"}},
		{"tiny MTU", func(c *Config) { c.MTU = 576 }, []string{"MTU"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.NodeName = "node1"
			c.change(&cfg)
			err := cfg.Validate()
			if len(c.want) == 0 && err != nil {
				t.Errorf("Validate: %v", err)
			}
			for _, part := range c.want {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("Validate: %v, want it to say %q", err, part)
				}
			}
		})
	}
}
