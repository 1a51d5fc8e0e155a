package mounter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lookupWithin is the timeout for looking up an NFS server's address.
const lookupWithin = 10 * time.Second

// nfsVersions are tried in this order if no version is given, as mount.nfs does.
var nfsVersions = []string{"vers=4.2", "vers=4.1", "vers=4.0", "vers=3"}

// isNFS reports whether a file system type is NFS, whose mount(8) helper determines options that the kernel
// requires.
func isNFS(fstype string) bool { return fstype == "nfs" || fstype == "nfs4" }

// mountNFS mounts an NFS export. The kernel requires the server's address and a version; both can be given as
// options, which take precedence.
func mountNFS(source, fstype string, o mountOptions, mount func(data string) error) error {
	candidates, err := nfsData(source, fstype, o.data, lookupAddr)
	if err != nil {
		return err
	}
	for _, data := range candidates {
		if err = mount(data); err == nil || !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPROTO) {
			return err
		}
	}
	return err // the error of the oldest version
}

// nfsData returns the kernel's mount options, one string per attempt.
func nfsData(source, fstype, data string, lookup func(host string) (string, error)) ([]string, error) {
	host, _, ok := strings.Cut(source, ":/")
	if !ok {
		return nil, fmt.Errorf("invalid NFS source %q: want SERVER:/PATH", source)
	}
	var options []string
	if data != "" {
		options = strings.Split(data, ",")
	}
	has := func(names ...string) bool {
		return slices.ContainsFunc(options, func(o string) bool {
			name, _, _ := strings.Cut(o, "=")
			return slices.Contains(names, name)
		})
	}
	if !has("addr") {
		addr, err := lookup(strings.Trim(host, "[]"))
		if err != nil {
			return nil, fmt.Errorf("look up the NFS server %s: %w", host, err)
		}
		options = append(options, "addr="+addr)
	}
	if fstype == "nfs4" || has("vers", "nfsvers", "minorversion", "v2", "v3", "v4", "v4.0", "v4.1", "v4.2") {
		return []string{strings.Join(options, ",")}, nil
	}
	var all []string
	for _, v := range nfsVersions {
		all = append(all, strings.Join(append(slices.Clone(options), v), ","))
	}
	return all, nil
}

// lookupAddr returns the first address of a host.
func lookupAddr(host string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupWithin)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return "", err
	}
	return addrs[0].Unmap().String(), nil
}
