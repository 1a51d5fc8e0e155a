package proxyenv

import "testing"

func TestNoProxy(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want string
	}{
		{map[string]string{}, ""},
		{map[string]string{"NO_PROXY": "x"}, ""},
		{map[string]string{"HTTPS_PROXY": "http://p"}, ".svc,10.42.0.0/16"},
		{map[string]string{"http_proxy": "http://p", "no_proxy": "a, .svc"}, "a,.svc,10.42.0.0/16"},
		{map[string]string{"HTTPS_PROXY": "http://p", "NO_PROXY": "b", "no_proxy": "a"}, "b,.svc,10.42.0.0/16"},
	} {
		if got := NoProxy(func(name string) string { return c.env[name] }, ".svc", "10.42.0.0/16"); got != c.want {
			t.Errorf("with %v it is %q, want %q", c.env, got, c.want)
		}
	}
}
