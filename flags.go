package main

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"kedge/internal/config"
	"kedge/server"
)

// Defaults of the paths, for flags, help and kubectl.
const (
	defaultDataDir    = "/var/lib/kedge"
	defaultRunDir     = "/run/kedge"
	defaultConfigFile = "/etc/kedge/config.yaml"
	defaultKubeconfig = "/etc/kedge/kedge.yaml"
)

// Categories of flags in help and reference.
const (
	catGeneral = "General"
	catNode    = "Node"
	catJoin    = "Joining"
	catNetwork = "Network"
	catAPI     = "API"
	catArgs    = "Upstream components"
)

func runDirFlag() cli.Flag {
	return &cli.StringFlag{Name: "run-dir", Category: catGeneral, Value: defaultRunDir, EnvVars: env("run-dir"),
		Usage: "Folder for everything that need not survive a reboot"}
}

func env(flag string) []string {
	return []string{"KEDGE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))}
}

// serverFlags are the flags of "kedge server". Each is also an environment
// variable and, but for --config, a key of the configuration file.
func serverFlags() []cli.Flag {
	str := func(category, name, value, usage string) cli.Flag {
		return &cli.StringFlag{Name: name, Category: category, Value: value, Usage: usage, EnvVars: env(name)}
	}
	list := func(category, name, usage string) cli.Flag {
		return &cli.StringSliceFlag{Name: name, Category: category, Usage: usage, EnvVars: env(name)}
	}
	boolean := func(category, name, usage string) cli.Flag {
		return &cli.BoolFlag{Name: name, Category: category, Usage: usage, EnvVars: env(name)}
	}
	return short([]cli.Flag{
		str(catGeneral, "config", defaultConfigFile, "Configuration `FILE`; files in FILE.d are read after it"),
		str(catGeneral, "data-dir", defaultDataDir, "`DIR` for everything durable"),
		runDirFlag(),
		str(catGeneral, "log-level", "info", "`LEVEL`: trace, debug, info, warn or error"),
		str(catGeneral, "log-format", "text", "`FORMAT`: text or json"),
		boolean(catGeneral, "debug", "The same as --log-level=debug"),
		boolean(catGeneral, "disable-agent", "Run the control plane only, no node"),
		list(catGeneral, "disable", "Part to leave out: dns or servicelb (can be repeated); of parts that only k3s has there is a warning"),

		str(catNode, "node-name", "", "`NAME` of the node (default: the hostname)"),
		list(catNode, "node-label", "`KEY=VALUE` to register the node with (can be repeated)"),
		list(catNode, "node-taint", "`KEY=VALUE:EFFECT` to register the node with (can be repeated)"),
		list(catNode, "node-ip", "`ADDRESS` of the node, at most one IPv4 and one IPv6 (default: that of the default route)"),
		list(catNode, "node-external-ip", "`ADDRESS` by which others reach the node from outside of its network, at most one IPv4 and one IPv6"),
		str(catNode, "resolv-conf", "", "`FILE` with the name servers for names outside of the cluster, and for pods with dnsPolicy Default (default: the host's)"),
		&cli.IntFlag{Name: "kubelet-port", Category: catNode, Value: 10250, Usage: "`PORT` of the kubelet", EnvVars: env("kubelet-port")},
		str(catNode, "snapshotter", "", "How image layers are stacked: overlayfs or native (default: overlayfs where it works)"),
		str(catNode, "private-registry", "/etc/kedge/registries.yaml", "`FILE` with registry mirrors and credentials"),

		list(catNetwork, "cluster-cidr", "`RANGE` of pod addresses, one of each family (default: 10.42.0.0/16)"),
		list(catNetwork, "service-cidr", "`RANGE` of service addresses, one of each family (default: 10.43.0.0/16)"),
		list(catNetwork, "cluster-dns", "`ADDRESS` of the cluster's DNS (default: the tenth of the service range)"),
		str(catNetwork, "cluster-domain", "cluster.local", "`DOMAIN` of the cluster"),
		list(catNetwork, "lb-pool", "`[NAME=]RANGE` of addresses for services of type LoadBalancer, in place of the nodes' (can be repeated)"),
		str(catNetwork, "flannel-backend", "vxlan", "`HOW` pods of different nodes meet, the same on all nodes: vxlan, wireguard, host-gw, udp or none (another network plug-in's business)"),
		str(catNetwork, "flannel-iface", "", "`INTERFACE` with the addresses by which nodes meet, also --node-ip's default (default: the default route's)"),
		boolean(catNetwork, "flannel-external-ip", "Send what is for pods of other nodes to these nodes' --node-external-ip"),
		boolean(catNetwork, "disable-network-policy", "Do not enforce network policies"),
		str(catNetwork, "service-node-port-range", "30000-32767", "`RANGE` of node ports"),
		list(catNetwork, "nodeport-addresses", "`RANGE` of node addresses at which node ports answer, or \"primary\" for the node's own (default: primary)"),
		str(catNetwork, "proxy-scheduler", "random", "`HOW` an endpoint of a service is chosen: random, round-robin or source-hash"),
		boolean(catNetwork, "disable-kube-proxy", "Leave services to another proxy"),

		str(catAPI, "bind-address", "", "`ADDRESS` that the API listens on (default: all)"),
		&cli.IntFlag{Name: "https-listen-port", Category: catAPI, Value: 6443, Usage: "`PORT` of the API", EnvVars: env("https-listen-port")},
		str(catAPI, "advertise-address", "", "`ADDRESS` by which others reach the API (default: the node's)"),
		list(catAPI, "tls-san", "Further name or address for the API's certificate (can be repeated)"),
		str(catAPI, "write-kubeconfig", defaultKubeconfig, "`FILE` for the administrator's kubeconfig"),
		str(catAPI, "write-kubeconfig-mode", "600", "`MODE` of that file, octal"),
		&cli.IntFlag{Name: "peer-port", Category: catAPI, Value: 2380, Usage: "`PORT` by which the servers' stores reach each other, where there are several", EnvVars: env("peer-port")},

		str(catJoin, "server", "", "`URL` of a server of the cluster to join, such as https://HOST:6443"),
		str(catJoin, "token", "", "With --server, the `TOKEN` to join with, from \"kedge token create\", needed at the first start only. Without, a secret of 16 characters or more with which agents may join for ever"),
		str(catJoin, "server-token", "", "Secret of 16 characters or more with which servers may join for ever, and thus have everything that a server has; \"kedge token create --role server\" makes better ones"),
		&cli.DurationFlag{Name: "agent-certificate-life", Category: catJoin, Value: server.DefaultConfig().AgentCertificateLife, EnvVars: env("agent-certificate-life"),
			Usage: "`TIME` for which the certificates that this server signs for agents are valid; they are renewed after half of it"},
		str(catJoin, "token-file", "", "`FILE` with the token"),

		list(catArgs, "kube-apiserver-arg", "`NAME=VALUE` for kube-apiserver (can be repeated)"),
		list(catArgs, "kube-controller-manager-arg", "`NAME=VALUE` for kube-controller-manager (can be repeated)"),
		list(catArgs, "kube-scheduler-arg", "`NAME=VALUE` for kube-scheduler (can be repeated)"),
		list(catArgs, "kubelet-arg", "`NAME=VALUE` for the kubelet (can be repeated)"),
	})
}

// shortNames are k3s's; the launcher has to know some of them too.
var shortNames = map[string]string{"config": "c", "data-dir": "d", "node-ip": "i", "server": "s", "token": "t", "write-kubeconfig": "o"}

// short gives flags their short names, but for those that are in except.
func short(flags []cli.Flag, except ...string) []cli.Flag {
	for _, f := range flags {
		alias, ok := shortNames[f.Names()[0]]
		var aliases []string
		if ok && !slices.Contains(except, alias) {
			aliases = []string{alias}
		}
		switch f := f.(type) {
		case *cli.StringFlag:
			f.Aliases = aliases
		case *cli.StringSliceFlag:
			f.Aliases = aliases
		}
	}
	return flags
}

// agentFlags are the flags of "kedge agent": those of "kedge server" that are about
// a node and not about the cluster, and how to join.
func agentFlags() []cli.Flag {
	var flags []cli.Flag
	for _, f := range serverFlags() {
		name, category := f.Names()[0], f.(cli.CategorizableFlag).GetCategory()
		switch {
		case name == "disable-agent" || name == "disable" || name == "server-token" || name == "agent-certificate-life":
		case name == "token":
			flags = append(flags, &cli.StringFlag{Name: name, Category: catJoin, EnvVars: env(name),
				Usage: "`TOKEN` to join with, from \"kedge token create\"; needed at the first start only"})
		case category == catGeneral || category == catNode || category == catJoin, slices.Contains([]string{"flannel-iface", "nodeport-addresses", "proxy-scheduler", "kubelet-arg"}, name):
			flags = append(flags, f)
		}
	}
	return short(flags)
}

// configKeys are the flags as the configuration file knows them.
func configKeys(flags []cli.Flag) []config.Key {
	var keys []config.Key
	for _, f := range flags {
		k := config.Key{Name: f.Names()[0]}
		switch f.(type) {
		case *cli.BoolFlag:
			k.Kind = config.Bool
		case *cli.IntFlag:
			k.Kind = config.Int
		case *cli.DurationFlag:
			k.Kind = config.Duration
		case *cli.StringSliceFlag:
			k.Kind = config.List
		}
		if k.Name != "config" {
			keys = append(keys, k)
		}
	}
	return keys
}

// applyConfigFiles sets every flag that neither the command line nor the
// environment has set to what the configuration files say, and returns these.
func applyConfigFiles(c *cli.Context, flags []cli.Flag) (map[string]config.Value, error) {
	files, err := config.Files(c.String("config"), c.IsSet("config"))
	if err != nil {
		return nil, err
	}
	values, err := config.Load(files, configKeys(flags))
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(values, func(name string, _ config.Value) bool { return c.IsSet(name) })
	for _, name := range slices.Sorted(maps.Keys(values)) {
		v := values[name]
		for _, item := range v.Items {
			if err := c.Set(name, item); err != nil {
				return nil, fmt.Errorf("%s: %s: %w", v.Source, name, err)
			}
		}
	}
	return values, nil
}

// invalidValue is how the flag parser says so.
var invalidValue = regexp.MustCompile(`^invalid (?:boolean )?value "(.*)" for (?:flag )?-([^:]*): parse error$`)

// invalidVariable is how it says so of the environment.
var invalidVariable = regexp.MustCompile(`^could not parse "(.*)" as \w+ value from environment variable "(\w+)" for flag ([^:]*): `)

// usageError makes one sentence of what the flag parser says, with the nearest
// name for an unknown flag.
func usageError(c *cli.Context, err error, _ bool) error {
	if m := invalidValue.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Errorf("--%s: %q is not %s", m[2], m[1], kindOf(c, m[2]))
	}
	if m := invalidVariable.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Errorf("%s: %q is not %s", m[2], m[1], kindOf(c, m[3]))
	}
	name, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: -")
	if !unknown {
		return fmt.Errorf("%w; see %q", err, "kedge help")
	}
	name = strings.TrimLeft(name, "-")
	var names []string
	if c.Command != nil {
		for _, f := range c.Command.Flags {
			names = append(names, f.Names()[0])
		}
	}
	if best := config.Nearest(name, names); best != "" {
		return fmt.Errorf("unknown flag --%s; did you mean --%s?", name, best)
	}
	return fmt.Errorf("unknown flag --%s; see %q", name, "kedge help")
}

// kindOf says what values a flag takes.
func kindOf(c *cli.Context, name string) string {
	if c.Command != nil {
		for _, f := range c.Command.Flags {
			if f.Names()[0] != name {
				continue
			}
			switch f.(type) {
			case *cli.IntFlag:
				return "a whole number"
			case *cli.BoolFlag:
				return "true or false"
			case *cli.DurationFlag:
				return "a duration such as 30s or 5m"
			}
		}
	}
	return "a value it takes"
}

// unknownCommand is the error for name, which is none of commands; prefix is what
// was typed before it.
func unknownCommand(prefix, name string, commands []*cli.Command) error {
	var names []string
	for _, cmd := range commands {
		names = append(names, cmd.Name)
	}
	if best := config.Nearest(name, names); best != "" {
		return fmt.Errorf("unknown command %q; did you mean %q?", prefix+name, prefix+best)
	}
	return fmt.Errorf("unknown command %q; see %q", prefix+name, strings.TrimSpace("kedge help "+prefix))
}

// subcommandsOnly is the action of a command that does nothing by itself.
func subcommandsOnly(c *cli.Context) error {
	if c.Args().Present() {
		return unknownCommand(c.Command.Name+" ", c.Args().First(), c.Command.Subcommands)
	}
	return cli.ShowSubcommandHelp(c)
}

// splitList splits the values of a flag whose items cannot contain commas, so
// that "a,b" and two flags mean the same.
func splitList(values []string) []string {
	var out []string
	for _, v := range values {
		for item := range strings.SplitSeq(v, ",") {
			if item = strings.TrimSpace(item); item != "" {
				out = append(out, item)
			}
		}
	}
	return out
}

var errNotRoot = errors.New("kedge needs root to run containers; start it as root, for example with sudo")
