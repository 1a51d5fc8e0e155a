// Package proxyenv keeps what stays inside the cluster away from the proxy that
// HTTPS_PROXY names, which is for images and the rest of the internet. Upstream's
// clients of kubelets, webhooks and pods would ask it for them.
//
// It is not a proxy. It may be imported by main.
package proxyenv

import (
	"cmp"
	"slices"
	"strings"
)

// NoProxy returns the value for NO_PROXY: what it says already, or else no_proxy, and
// further names and ranges. It is empty when no proxy is configured.
func NoProxy(getenv func(string) string, more ...string) string {
	if cmp.Or(getenv("HTTPS_PROXY"), getenv("https_proxy"), getenv("HTTP_PROXY"), getenv("http_proxy")) == "" {
		return ""
	}
	var all []string
	for entry := range strings.SplitSeq(cmp.Or(getenv("NO_PROXY"), getenv("no_proxy")), ",") {
		if entry = strings.TrimSpace(entry); entry != "" {
			all = append(all, entry)
		}
	}
	for _, entry := range more {
		if !slices.Contains(all, entry) {
			all = append(all, entry)
		}
	}
	return strings.Join(all, ",")
}
