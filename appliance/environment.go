package appliance

import (
	"slices"
	"strings"
)

// proxyNames are the variables that the service gets from the caller of "kedge install".
func proxyNames() []string {
	return []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
}

// environmentFile returns the file with the service's variables: the present file with the proxy variables of environ
// changed. Other lines stay. systemd and shells read the file alike.
func environmentFile(present []byte, environ []string) []byte {
	text := lines(present)
	if n := len(text); n > 0 && !strings.HasSuffix(text[n-1], "\n") {
		text[n-1] += "\n"
	}
	for _, name := range proxyNames() {
		i := slices.IndexFunc(environ, func(v string) bool { return strings.HasPrefix(v, name+"=") })
		if i < 0 {
			continue
		}
		value := strings.TrimPrefix(environ[i], name+"=")
		if value == "" || strings.ContainsAny(value, "\n\x00") {
			continue
		}
		line := name + `="` + escaped(value) + "\"\n"
		if at := slices.IndexFunc(text, func(l string) bool { return strings.HasPrefix(l, name+"=") }); at >= 0 {
			text[at] = line
		} else {
			text = append(text, line)
		}
	}
	if len(text) > 0 && len(present) == 0 {
		text = append([]string{"# Variables of the service, written by \"kedge install\"; lines of your own are kept.\n"}, text...)
	}
	return []byte(strings.Join(text, ""))
}
