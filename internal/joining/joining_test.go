package joining

import (
	"strings"
	"testing"
	"time"
)

func TestRenewalIsBetweenHalfAndFourFifths(t *testing.T) {
	signed := time.Now()
	end := signed.Add(10 * time.Hour)
	for random, want := range map[float64]time.Duration{0: 5 * time.Hour, 0.5: 6*time.Hour + 30*time.Minute, 1: 8 * time.Hour} {
		if got := renewAfter(signed, end, random); got.Round(time.Second) != want {
			t.Errorf("random %v: after %s, want %s", random, got, want)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	for _, tc := range []struct{ server, token, want string }{
		{"https://a:6443", "", ""}, {"https://[2001:db8::1]:6443/", "", ""},
		{"", "", "--server https://HOST:6443"}, {"a:6443", "", "is not like"}, {"http://a:6443", "", "is not like"}, {"https://a/b", "", "is not like"},
		{"https://u:p@a", "", "is not like"}, {"https://a:6443", "K1x::y", "--token"},
	} {
		err := Config{Dir: "/d", Server: tc.server, Token: tc.token, NodeName: "n"}.Validate()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%q %q: got %v, want %q", tc.server, tc.token, err, tc.want)
		}
	}
}
