package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/agent"
	"kedge/dns"
	"kedge/internal/datadir"
	"kedge/internal/logging"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/proxy"
	"kedge/runtime"
)

func killallCommand() *cli.Command {
	flags := serverFlags()
	return &cli.Command{
		Name:  "killall",
		Usage: "End this node's containers and remove what they left in the kernel; kedge itself must be stopped",
		Description: "Stopping kedge leaves containers running, so that an upgrade does not touch them.\n" +
			"killall ends them too, and removes their mounts, cgroups, network interfaces and rules.\n" +
			"Images, volumes and the cluster's data stay: the next start brings the pods back.",
		Flags: flags,
		Action: func(c *cli.Context) error {
			return configured(c, flags, func() error { return killallHere(c) })
		},
	}
}

func killallHere(c *cli.Context) error {
	// Addresses are of no use here, and the machine may have none.
	if !c.IsSet("node-ip") {
		if err := c.Set("node-ip", "127.0.0.1"); err != nil {
			return err
		}
	}
	// What there is to end is the node's whose directory it is, whatever this machine is called.
	if !c.IsSet("node-name") {
		name, err := datadir.NodeName(c.String("data-dir"))
		if err != nil {
			return err
		}
		if name != "" {
			if err := c.Set("node-name", name); err != nil {
				return err
			}
		}
	}
	s, err := composeAny(c)
	if err != nil {
		return err
	}
	return killall(c.Context, s)
}

func killall(ctx context.Context, s settings) error {
	if os.Geteuid() != 0 {
		return errNotRoot
	}
	log := logging.New(os.Stderr, s.log)
	logging.Setup(log)
	if _, err := os.Stat(s.dataDir); errors.Is(err, os.ErrNotExist) {
		// Nothing to clean, and most likely a typing error.
		return fmt.Errorf("there is no data directory %s; name the node's with --data-dir", s.dataDir)
	}
	dir, err := datadir.Open(s.dataDir, s.runDir, s.nodeName, version, time.Now())
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := runtime.KillAll(ctx, s.runtime, log); err != nil {
		return err
	}
	var services error
	if s.proxy != nil {
		services = proxy.Cleanup(*s.proxy)
	}
	return errors.Join(agent.Cleanup(ctx, s.agent), network.Cleanup(s.network), backend.Cleanup(s.nodeName), services, dns.Cleanup(s.agent.ClusterDNS))
}
