// Package proxyenv exempts traffic inside the cluster from the proxy in HTTPS_PROXY, which is meant for image
// pulls and other connections to the internet. Without the exemption, upstream's clients of kubelets, webhooks
// and pods would use the proxy.
//
// It is not a proxy. Package assembly imports it.
package proxyenv

import (
	"cmp"
	"slices"
	"strings"
)

// NoProxy returns a value for NO_PROXY: the present value, or else that of no_proxy, with more names and ranges
// appended. It is empty if no proxy is configured.
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
