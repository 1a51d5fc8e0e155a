package runtime

import (
	"fmt"
	"strings"
)

// hostFiles renders hosts.toml for every registry that needs one, keyed by folder name. address returns the URL
// at which rewriter serves an endpoint; it is called only for mirrors with rewrites.
func hostFiles(r Registries, noDefault bool, address func(mirror, endpoint string) string) map[string]string {
	registries := map[string]bool{}
	for host := range r.Mirrors {
		registries[host] = true
	}
	for host := range r.Configs {
		registries[host] = true
	}
	files := map[string]string{}
	for host := range registries {
		if text := hostFile(r, host, noDefault, address); text != "" {
			files[hostFolder(host)] = text
		}
	}
	return files
}

// hostFolder returns the folder name under which containerd looks for a host. It has no colons.
func hostFolder(host string) string {
	if host == allRegistries {
		return "_default"
	}
	if i := strings.LastIndex(host, ":"); i > 0 {
		return host[:i] + "_" + host[i+1:] + "_"
	}
	return host
}

// hostFile renders one hosts.toml, or returns "" if containerd's defaults are sufficient.
func hostFile(r Registries, host string, noDefault bool, address func(mirror, endpoint string) string) string {
	mirror := r.Mirrors[host]
	lastResort := "" // the registry itself
	if host != allRegistries {
		e, err := parseEndpoint(host)
		if err != nil {
			return "" // containerd never looks for a folder of that name
		}
		lastResort = e.String()
	}

	type block struct {
		url      string
		override bool
		config   RegistryConfig
	}
	var blocks []block
	seen := map[string]bool{}
	for _, text := range mirror.Endpoints {
		e, err := parseEndpoint(text)
		if err != nil || seen[e.String()] {
			continue // validate has reported an invalid endpoint; a duplicate has no effect
		}
		seen[e.String()] = true
		if len(mirror.Rewrites) > 0 {
			blocks = append(blocks, block{url: address(host, text), override: true})
			continue
		}
		blocks = append(blocks, block{url: e.String(), override: e.overridePath, config: r.configFor(e.Host)})
	}

	last := block{url: lastResort, config: r.configFor(host)}
	if n := len(blocks); n > 0 && (noDefault || blocks[n-1].url == lastResort) {
		// containerd always falls back to a server, by default to the registry itself.
		last, blocks = blocks[n-1], blocks[:n-1]
	}
	if len(blocks) == 0 && last.url == lastResort && last.config.TLS == nil {
		return ""
	}

	var b strings.Builder
	b.WriteString("# Written by kedge from registries.yaml at every start. Changes are lost.\n\n")
	if last.url != "" {
		fmt.Fprintf(&b, "server = %q\n", last.url)
	}
	b.WriteString("capabilities = [\"pull\", \"resolve\", \"push\"]\n")
	writeTransport(&b, "", last.override, last.config.TLS)
	for _, bl := range blocks {
		fmt.Fprintf(&b, "\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", bl.url)
		writeTransport(&b, "  ", bl.override, bl.config.TLS)
	}
	return b.String()
}

func writeTransport(b *strings.Builder, indent string, override bool, t *RegistryTLS) {
	if override {
		fmt.Fprintf(b, "%soverride_path = true\n", indent)
	}
	if t == nil {
		return
	}
	if t.CAFile != "" {
		fmt.Fprintf(b, "%sca = [%q]\n", indent, t.CAFile)
	}
	if t.CertFile != "" {
		fmt.Fprintf(b, "%sclient = [[%q, %q]]\n", indent, t.CertFile, t.KeyFile)
	}
	if t.InsecureSkipVerify {
		fmt.Fprintf(b, "%sskip_verify = true\n", indent)
	}
}
