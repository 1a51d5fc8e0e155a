package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"kedge/appliance/bundle"
	"kedge/appliance/doctor"
	"kedge/appliance/support"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/preflight"
	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/survivor"
	"kedge/settings"
)

// Program has the functions and properties that the commands use. All fields must be set, except Launcher.
type Program struct {
	Version  string
	Commit   string
	Modules  []Module // versions of the components in the executable
	Launcher string   // the executable that the user has started; empty if there is no launcher

	Server  func(context.Context, Node) error
	Agent   func(context.Context, Node) error
	KillAll func(context.Context, Node) error
	// Check checks the machine. found means that results are valid; the error then describes why kedge cannot
	// run.
	Check func(context.Context, Node) (results []preflight.Result, found bool, err error)

	// Doctor examines the machine and its node, and repairs with fix what can be repaired safely.
	Doctor func(ctx context.Context, n Node, fix bool) doctor.Report
	// SupportBundle writes the state of the machine and its node to w. version is the text of "kedge version".
	SupportBundle func(ctx context.Context, n Node, version string, w io.Writer) (support.Summary, error)
	// Restore makes this machine the server of the cluster in a snapshot file. lock opens it; nil for a file with a database
	// only.
	Restore func(ctx context.Context, n Node, file string, lock archive.Lock, force bool) (Restored, error)
	// Survivor returns what the stopped server of this machine holds, and which other servers answer.
	Survivor func(ctx context.Context, n Node) (survivor.State, error)
	// Recover makes it the only server of its cluster, whose majority is gone for good. others are the states of other stopped
	// servers.
	Recover func(ctx context.Context, n Node, others []survivor.State, force bool) (Restored, error)
	// Bucket opens the bucket in the settings, where snapshots are stored outside of the machine.
	Bucket func(ctx context.Context, n Node) (Bucket, error)
	// ResetServer sets the datastore of a stopped server aside, and returns where it is kept.
	ResetServer  func(n Node) (kept string, err error)
	Certificates Certificates
	// ImportK3s imports the objects of a k3s cluster. The result is valid with an error too: it is what was done until then.
	ImportK3s func(context.Context, K3sImport) (K3sImported, error)
	// LinkPrefixes returns the prefixes of the names of a node's network interfaces.
	LinkPrefixes func(node string) []string

	Kubectl    func(args []string, machines string) int // machines is the path of the kubeconfig of this machine's server
	Containers Containers
}

// Module is a component of the executable with its version.
type Module struct{ Name, Version string }

// Node is the input of commands about a whole node.
type Node struct {
	Values   settings.Values
	Token    string   // text of --token, or of the file of --token-file
	Warnings []string // about settings without effect
	// Role is the role of a node that will be installed; 0 for a node that there is.
	Role settings.Role
}

// Containers has the functions that use containerd. socket is the path of its socket.
type Containers struct {
	Socket func(runDir string) (socket string)
	List   func(ctx context.Context, socket string, out io.Writer) error
	Import func(ctx context.Context, socket string, out io.Writer, archives []string) error
	Remove func(ctx context.Context, socket string, out io.Writer, images []string) error
	Pull   func(ctx context.Context, socket string, out io.Writer, images []string) error
	Export func(ctx context.Context, socket string, to io.Writer, images []string) error
	Ctr    func(ctx context.Context, socket string, args []string) error

	// ReadArchive and Fetch put the blobs of images into a folder for a bundle, without a node: those of an archive, and of an
	// image that is pulled as a registries.yaml says.
	ReadArchive func(ctx context.Context, name string, r io.Reader, dir string) ([]bundle.Image, error)
	Fetch       func(ctx context.Context, registriesFile, image string, architectures []string, dir string) (bundle.Image, error)
}

// Run executes the command line args, of which the first is the program's name, and returns the exit code.
func (p *Program) Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	// k3s and many other programs accept these flags. As flags of a command they have another meaning.
	if len(args) == 2 && (args[1] == "--version" || args[1] == "-v") {
		args = []string{args[0], "version"}
	}
	app := p.app(stdout, stderr)
	if completeFlag(app, args) {
		return 0
	}
	args, err := reorderFlags(app, args)
	if err == nil {
		err = app.RunContext(ctx, args)
	}
	if err == nil {
		return 0
	}
	var code exitCode
	if errors.As(err, &code) { // the command has printed the reason
		return int(code)
	}
	fmt.Fprintln(stderr, "kedge:", err)
	exit := errorkind.ExitCode(err)
	if exit == errorkind.ExitUsage || exit == errorkind.ExitConfig { // of a service: it would be started again in vain
		if err := lifecycle.EndSupervision(); err != nil {
			fmt.Fprintln(stderr, "kedge: the supervision of the service could not be ended:", err)
		}
	}
	return exit
}

// exitCode is the error of a command that has already printed the reason.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// app returns the command line with all commands.
func (p *Program) app(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:                      "kedge",
		Usage:                     "Kubernetes in one file",
		Version:                   p.Version,
		Writer:                    stdout,
		ErrWriter:                 stderr,
		HideVersion:               true, // version is a command
		HideHelpCommand:           true, // kedge's help command supports subcommands and suggests names
		Flags:                     []cli.Flag{cli.HelpFlag},
		DisableSliceFlagSeparator: true,
		EnableBashCompletion:      true,
		ExitErrHandler:            func(*cli.Context, error) {}, // Run returns the exit code
		Commands: []*cli.Command{
			p.serverCommand(),
			p.agentCommand(),
			p.upCommand(),
			p.downCommand(),
			p.lsCommand(),
			p.logsCommand(),
			p.tokenCommand(),
			p.secretsEncryptCommand(),
			accountKeyCommand(),
			p.nodeCommand(),
			p.snapshotCommand(),
			recoveryKeyCommand(),
			p.recoverCommand(),
			p.importCommand(),
			kubeconfigCommand(),
			p.certificateCommand(),
			p.statusCommand(),
			p.netCommand(),
			p.checkCommand(),
			p.doctorCommand(),
			p.supportCommand(),
			p.imagesCommand(),
			p.killallCommand(),
			p.installCommand(),
			p.upgradeCommand(),
			p.uninstallCommand(),
			p.kubectlCommand(),
			p.ctrCommand(),
			p.verifyCommand(),
			p.bundleCommand(),
			p.versionCommand(),
			completionCommand(),
			p.referenceCommand(),
			helpCommand(),
		},
	}
	app.Action = func(c *cli.Context) error {
		if c.Args().Present() {
			return unknownCommand("", c.Args().First(), app.Commands)
		}
		return cli.ShowAppHelp(c)
	}
	return app
}

// needRoot returns an error if the user is not root, before the command fails halfway because it cannot read
// kedge's files. does describes the command in the error.
func needRoot(does string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return errorkind.Permanent(fmt.Errorf("only root can %s; run the command as root, for example with sudo", does))
}
