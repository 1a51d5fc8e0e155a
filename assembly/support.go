package assembly

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"time"

	"kedge/appliance/doctor"
	"kedge/appliance/support"
	"kedge/settings"
)

// logFile is where the service of a system without systemd writes the log.
const logFile = "/var/log/kedge.log"

// SupportBundle collects what somebody needs who helps from afar, and writes it to w. version is the text of "kedge
// version".
func SupportBundle(ctx context.Context, in Input, version string, w io.Writer) (support.Summary, error) {
	d := doctorConfig(in)
	c := support.Config{
		Node: d.NodeName, Version: version, DataDir: d.DataDir, RunDir: d.RunDir, Kubeconfig: d.Kubeconfig,
		LogFiles: []string{logFile, logFile + ".1", filepath.Join(d.DataDir, "kedge.log")},
		Secrets:  []string{in.Token},
		Doctor:   func(ctx context.Context) doctor.Report { return doctor.Run(ctx, d, false) },
	}
	if d.HasUnit() {
		c.Unit = "kedge"
	}
	if d.CgroupRoot != "" {
		c.CgroupRoots = []string{d.CgroupRoot}
	}
	for _, s := range in.Values.Written() {
		if s.Name != "output" { // of the command
			c.Settings = append(c.Settings, support.Setting(s))
		}
	}
	for _, e := range settings.DatastoreEndpoints.In(in.Values) { // no etcd's has a password, but a database's, which is refused
		if _, rest, ok := strings.Cut(e, "://"); ok && strings.Contains(rest, "@") {
			c.Secrets = append(c.Secrets, rest[:strings.LastIndex(rest, "@")])
		}
	}
	c.Secrets = append(c.Secrets, settings.Token.In(in.Values), settings.ServerToken.In(in.Values))
	return support.Write(ctx, c, w, time.Now())
}
