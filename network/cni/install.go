package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// PluginName is the name of the kedge executable as the CNI plugin.
const PluginName = "kedge-cni"

// confVersion is not the newest version that the plugin supports: from 1.1.0 on, the
// runtime executes STATUS whenever the kubelet requests its status, which would start an
// executable every few seconds. The presence of the file says the same.
const confVersion = "1.0.0"

// confName sorts before the files of other networks in the directory.
const confName = "10-kedge.conflist"

// InstallPlugin creates the link binDir/kedge-cni to an executable.
func InstallPlugin(binDir, executable string) error {
	if err := os.MkdirAll(binDir, 0o755); err != nil {
		return fmt.Errorf("install CNI plugin: %w", err)
	}
	path := filepath.Join(binDir, PluginName)
	if now, err := os.Readlink(path); err == nil && now == executable {
		return nil
	}
	// Renamed into place: the runtime finds the old link or the new one.
	next := path + ".next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("install CNI plugin: %w", err)
	}
	if err := os.Symlink(executable, next); err != nil {
		return fmt.Errorf("install CNI plugin: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("install CNI plugin: %w", err)
	}
	return nil
}

// WriteConf writes the network configuration for which the container runtime waits: the
// file makes it report the network as ready. The runtime watches the directory, so the file
// appears complete.
func WriteConf(confDir, socket string) error {
	if err := os.MkdirAll(confDir, 0o755); err != nil {
		return fmt.Errorf("write CNI configuration: %w", err)
	}
	text, err := json.MarshalIndent(map[string]any{
		"cniVersion": confVersion,
		"name":       "kedge",
		"plugins": []any{map[string]any{
			"type":         PluginName,
			"socket":       socket,
			"capabilities": map[string]bool{"portMappings": true},
		}},
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("write CNI configuration: %w", err)
	}
	text = append(text, '\n')
	path := filepath.Join(confDir, confName)
	if now, err := os.ReadFile(path); err == nil && string(now) == string(text) {
		return nil
	}
	// The runtime ignores names that do not end in .conf, .conflist or .json.
	next := path + ".next"
	if err := os.WriteFile(next, text, 0o644); err != nil {
		return fmt.Errorf("write CNI configuration: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("write CNI configuration: %w", err)
	}
	return nil
}

// RemoveConf removes the configuration: the runtime then reports that the network is not
// ready, and starts no pods.
func RemoveConf(confDir string) error {
	err := os.Remove(filepath.Join(confDir, confName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove CNI configuration: %w", err)
	}
	return nil
}

// RemovePlugin undoes InstallPlugin.
func RemovePlugin(binDir string) error {
	err := os.Remove(filepath.Join(binDir, PluginName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove CNI plugin: %w", err)
	}
	return nil
}

// RemoveLinks removes the host interfaces of all pods of a node, with or without a lease,
// and with them the pods' interfaces, addresses and routes.
func RemoveLinks(node string) error {
	p := &Plugin{node: node, prefix: LinkPrefix(node)}
	h, err := routeSocket()
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := p.links(h)
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range links {
		errs = append(errs, removeLink(h, link.Attrs().Name))
	}
	return errors.Join(errs...)
}
