package appliance

import (
	"io/fs"
	"slices"
	"strings"
	"testing"
)

const bin = "/usr/local/bin/kedge"

// regular is a file with a content and a mode.
func regular(content string, mode fs.FileMode) Found {
	return Found{Exists: true, Hash: hashOf([]byte(content)), Mode: mode}
}

func link(target string) Found {
	return Found{Exists: true, Kind: fs.ModeSymlink, Mode: fs.ModeSymlink, Target: target}
}

func file(path, content string, mode fs.FileMode) File {
	return File{Path: path, Data: []byte(content), Hash: hashOf([]byte(content)), Mode: mode}
}

// usual is an installation with a file of each kind.
func usual() wanted {
	program := File{Path: bin, Source: "/tmp/kedge", Hash: hashOf([]byte("new")), Mode: 0o755, Restarts: true, What: "a program"}
	config := file("/etc/kedge/config.yaml", "debug: true\n", 0o600)
	config.Edited, config.Restarts = true, true
	unit := file("/etc/systemd/system/kedge.service", "unit", 0o644)
	unit.Restarts, unit.Remedy = true, "keep changes in a drop-in"
	once := file("/etc/conf.d/kedge", "once", 0o644)
	once.Once = true
	optional := file("/usr/share/completion/kedge", "script", 0o644)
	optional.Optional = true
	return wanted{
		journal:  Journal{Role: "server", DataDir: "/var/lib/kedge", Config: "/etc/kedge/config.yaml"},
		dirs:     []string{"/etc/kedge"},
		files:    []File{program, config, unit, once, optional},
		links:    []Link{{"/usr/local/bin/kubectl", "kedge"}},
		linkMode: LinksAuto, service: true,
	}
}

// installed is the machine after the plan of usual was executed.
func installed() current {
	want := usual()
	j := want.journal
	cur := current{journal: &j, found: map[string]Found{"/etc/kedge": {Exists: true, Kind: fs.ModeDir}}, service: ServiceState{Enabled: true, Active: true}}
	for _, f := range want.files {
		cur.found[f.Path] = Found{Exists: true, Hash: f.Hash, Mode: f.Mode}
		j.Entries = append(j.Entries, Entry{Kind: FileEntry, Path: f.Path, Hash: f.Hash})
	}
	cur.found["/usr/local/bin/kubectl"] = link("kedge")
	j.Entries = append(j.Entries, Entry{Kind: LinkEntry, Path: "/usr/local/bin/kubectl", Target: "kedge"})
	return cur
}

func text(steps []step) string {
	var out []string
	for _, s := range steps {
		out = append(out, s.String())
	}
	return strings.Join(out, "\n")
}

func TestPlanOfNewMachine(t *testing.T) {
	steps, notes, err := plan(current{found: map[string]Found{}}, usual())
	want := `create directory /etc/kedge
copy /tmp/kedge to /usr/local/bin/kedge
write /etc/kedge/config.yaml
write /etc/systemd/system/kedge.service
write /etc/conf.d/kedge
write /usr/share/completion/kedge
link /usr/local/bin/kubectl to kedge
make the service manager read its files
enable the service kedge
start the service kedge`
	if err != nil || len(notes) > 0 || text(steps) != want {
		t.Errorf("%v, %v\n%s", err, notes, text(steps))
	}
}

func TestPlanIsIdempotent(t *testing.T) {
	steps, notes, err := plan(installed(), usual())
	if err != nil || len(notes) > 0 || len(steps) > 0 {
		t.Errorf("%v, %v\n%s", err, notes, text(steps))
	}
}

// TestPlan: what one difference from the installed machine leads to.
func TestPlan(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*current, *wanted)
		steps  string // one a line
		note   string
		err    string
	}{
		"newer program": {func(c *current, w *wanted) {
			c.found[bin], c.journal.find(FileEntry, bin).Hash = regular("old", 0o755), hashOf([]byte("old"))
		}, "copy /tmp/kedge to " + bin + "\nmake the service manager read its files\nrestart the service kedge", "", ""},
		"program of somebody else": {func(c *current, w *wanted) { c.found[bin] = regular("theirs", 0o755); c.journal.drop(FileEntry, bin) }, "", "",
			bin + " is a program that \"kedge install\" did not write; give --force to replace it, or remove it"},
		"program of somebody else, forced": {func(c *current, w *wanted) {
			c.found[bin] = regular("theirs", 0o755)
			c.journal.drop(FileEntry, bin)
			w.force = true
		}, "copy /tmp/kedge to " + bin + "\nmake the service manager read its files\nrestart the service kedge", "", ""},
		"program put there by hand": {func(c *current, w *wanted) { c.journal.drop(FileEntry, bin) }, "copy /tmp/kedge to " + bin + "\nmake the service manager read its files\nrestart the service kedge", "", ""},
		"program is a link":         {func(c *current, w *wanted) { c.found[bin] = link("/opt/kedge") }, "", "", bin + " is a link to /opt/kedge; give --force to replace it, or remove it"},
		"program is a directory":    {func(c *current, w *wanted) { c.found[bin] = Found{Exists: true, Kind: fs.ModeDir} }, "", "", bin + " is not a file; remove it"},
		"changed configuration": {func(c *current, w *wanted) { c.found["/etc/kedge/config.yaml"] = regular("debug: false\n", 0o600) },
			"write /etc/kedge/config.yaml\nmake the service manager read its files\nrestart the service kedge", "", ""},
		"changed unit": {func(c *current, w *wanted) { c.found["/etc/systemd/system/kedge.service"] = regular("theirs", 0o644) }, "", "",
			"/etc/systemd/system/kedge.service is changed since \"kedge install\" wrote it; keep changes in a drop-in, and give --force to replace the file"},
		"changed mode": {func(c *current, w *wanted) { c.found["/etc/kedge/config.yaml"] = regular("debug: true\n", 0o644) },
			"write /etc/kedge/config.yaml\nmake the service manager read its files\nrestart the service kedge", "", ""},
		"file for the user": {func(c *current, w *wanted) { c.found["/etc/conf.d/kedge"] = regular("theirs", 0o600) }, "", "", ""},
		"completion of another": {func(c *current, w *wanted) {
			c.found["/usr/share/completion/kedge"] = regular("theirs", 0o644)
			c.journal.drop(FileEntry, "/usr/share/completion/kedge")
		}, "", "/usr/share/completion/kedge is a file that \"kedge install\" did not write and stays as it is", ""},
		"completion of another, with the same content": {func(c *current, w *wanted) { c.journal.drop(FileEntry, "/usr/share/completion/kedge") }, "", "", ""},
		"completion of another, with the same content, forced": {func(c *current, w *wanted) {
			c.journal.drop(FileEntry, "/usr/share/completion/kedge")
			w.force = true
		}, "write /usr/share/completion/kedge", "", ""},
		"completion is a directory": {func(c *current, w *wanted) {
			c.found["/usr/share/completion/kedge"] = Found{Exists: true, Kind: fs.ModeDir}
		}, "", "/usr/share/completion/kedge is not a file and stays as it is", ""},
		"completion whose writing was interrupted": {func(c *current, w *wanted) {
			e := c.journal.find(FileEntry, "/usr/share/completion/kedge")
			e.Hash, e.Next = "", e.Hash
		}, "write /usr/share/completion/kedge", "", ""},
		"interrupted while a file was written": {func(c *current, w *wanted) {
			c.found[bin], c.journal.find(FileEntry, bin).Hash, c.journal.find(FileEntry, bin).Next = regular("older", 0o755), "", hashOf([]byte("older"))
		}, "copy /tmp/kedge to " + bin + "\nmake the service manager read its files\nrestart the service kedge", "", ""},
		"interrupted before the restart": {func(c *current, w *wanted) { c.journal.Restart = true }, "make the service manager read its files\nrestart the service kedge", "", ""},
		"stopped":                        {func(c *current, w *wanted) { c.service.Active = false }, "start the service kedge", "", ""},
		"not enabled":                    {func(c *current, w *wanted) { c.service.Enabled = false }, "enable the service kedge", "", ""},
		"no service manager":             {func(c *current, w *wanted) { c.service, w.service = ServiceState{}, false }, "", "", ""},
		"link removed":                   {func(c *current, w *wanted) { c.found["/usr/local/bin/kubectl"] = Found{} }, "link /usr/local/bin/kubectl to kedge", "", ""},
		"kubectl of the system": {func(c *current, w *wanted) {
			c.found["/usr/local/bin/kubectl"], c.commands = Found{}, map[string]string{"kubectl": "/usr/bin/kubectl"}
		}, "", "no link /usr/local/bin/kubectl, because /usr/bin/kubectl exists; \"kedge kubectl\" is the same command", ""},
		"kubectl of the system, forced": {func(c *current, w *wanted) {
			c.found["/usr/local/bin/kubectl"], c.commands, w.linkMode = Found{}, map[string]string{"kubectl": "/usr/bin/kubectl"}, LinksForce
		}, "link /usr/local/bin/kubectl to kedge", "", ""},
		"kubectl in our place": {func(c *current, w *wanted) { c.found["/usr/local/bin/kubectl"] = regular("theirs", 0o755) }, "", "/usr/local/bin/kubectl exists and stays as it is; \"kedge kubectl\" is the same command", ""},
		"kubectl in our place, forced": {func(c *current, w *wanted) {
			c.found["/usr/local/bin/kubectl"], w.linkMode = regular("theirs", 0o755), LinksForce
		}, "", "", "/usr/local/bin/kubectl is not a link, and --links=force replaces only links; remove it, or give --links=skip"},
		"another's link, forced":         {func(c *current, w *wanted) { c.found["/usr/local/bin/kubectl"], w.linkMode = link("k3s"), LinksForce }, "link /usr/local/bin/kubectl to kedge", "", ""},
		"no links":                       {func(c *current, w *wanted) { c.found["/usr/local/bin/kubectl"], w.linkMode = Found{}, LinksSkip }, "", "", ""},
		"another role":                   {func(c *current, w *wanted) { w.journal.Role = "agent" }, "", "", "kedge is installed as a server on this machine, and an installation cannot become an agent; \"kedge uninstall --purge\" removes it with its data, then install it anew"},
		"another data directory":         {func(c *current, w *wanted) { w.journal.DataDir = "/data" }, "", "", "kedge is installed with the data directory /var/lib/kedge, which cannot be changed to /data; \"kedge uninstall\" removes the installation and keeps the data, move the directory then and install kedge anew"},
		"a file in place of a directory": {func(c *current, w *wanted) { c.found["/etc/kedge"] = regular("", 0o644) }, "", "", "/etc/kedge is not a directory; remove it"},
	} {
		cur, want := installed(), usual()
		test.change(&cur, &want)
		steps, notes, err := plan(cur, want)
		var problem string
		if err != nil {
			problem = err.Error()
		}
		if text(steps) != test.steps || strings.Join(notes, "\n") != test.note || problem != test.err {
			t.Errorf("%s: error %q, notes %q\n%s", name, problem, notes, text(steps))
		}
	}
}

func TestPlanRecordsFilesOfTheUser(t *testing.T) {
	cur := current{found: map[string]Found{"/etc/kedge/config.yaml": regular("# mine\n", 0o644)}}
	steps, _, err := plan(cur, usual())
	i := slices.IndexFunc(steps, func(s step) bool { return s.path == "/etc/kedge/config.yaml" })
	if err != nil || i < 0 || !steps[i].adopt {
		t.Errorf("%v: %s", err, text(steps))
	}
}

func TestPlanRemoval(t *testing.T) {
	cur := installed()
	j := *cur.journal
	j.Init, j.RunDir = "systemd", "/run/kedge"
	j.Entries = append(j.Entries,
		Entry{Kind: DirEntry, Path: "/etc/kedge"}, Entry{Kind: DirEntry, Path: "/etc/kedge/below"},
		Entry{Kind: FileEntry, Path: "/etc/kedge/token", Hash: hashOf([]byte("t"))},
		Entry{Kind: GeneratedEntry, Path: "/etc/kedge/kedge.yaml"},
		Entry{Kind: ContextEntry, Path: "/home/u/.kube/config", Target: "kedge@n"}, Entry{Kind: ServiceEntry, Path: "kedge"})
	found := cur.found
	found["/etc/kedge/below"], found["/etc/kedge/token"], found["/etc/kedge/kedge.yaml"] = Found{Exists: true, Kind: fs.ModeDir}, regular("t", 0o600), regular("k", 0o600)
	say := func(purge bool) (string, string) {
		steps, notes := planRemoval(j, found, purge)
		var out []string
		for _, s := range steps {
			if s.time == 0 {
				t.Errorf("no limit: %s", s)
			}
			out = append(out, s.String())
		}
		return strings.Join(out, "\n"), strings.Join(notes, "\n")
	}
	got, notes := say(false)
	want := `stop the service kedge
disable the service kedge
kill the containers and remove their kernel objects
restore kernel parameters
remove the context kedge@n from /home/u/.kube/config
remove /etc/systemd/system/kedge.service
remove /etc/conf.d/kedge
remove /usr/share/completion/kedge
remove /usr/local/bin/kubectl
make the service manager read its files
remove data /run/kedge
remove /usr/local/bin/kedge
remove the journal /var/lib/kedge/install.json
remove directory if it is empty /etc/kedge/below
remove directory if it is empty /etc/kedge`
	if got != want {
		t.Errorf("got\n%s", got)
	}
	if want := "/etc/kedge/config.yaml stays, for the data that stays; --purge removes both\n/etc/kedge/token stays, for the data that stays; --purge removes both\n/var/lib/kedge stays, with the data of the node; --purge removes it"; notes != want {
		t.Errorf("notes\n%s", notes)
	}
	got, notes = say(true)
	for _, line := range []string{"remove data /var/lib/kedge\nremove /usr/local/bin/kedge\nremove /etc/kedge/config.yaml\nremove the journal", "remove /etc/kedge/token", "remove /etc/kedge/kedge.yaml"} {
		if !strings.Contains(got, line) {
			t.Errorf("no %q in\n%s", line, got)
		}
	}
	if notes != "" {
		t.Error(notes)
	}
	// Files that somebody has changed stay.
	found[bin], found["/usr/local/bin/kubectl"] = regular("theirs", 0o755), link("k3s")
	got, notes = say(false)
	if strings.Contains(got, "remove "+bin) || strings.Contains(got, "kubectl") ||
		!strings.Contains(notes, bin+" stays: it was changed") || !strings.Contains(notes, "/usr/local/bin/kubectl stays: it is not kedge's link any more") {
		t.Errorf("got\n%s\n%s", got, notes)
	}
}
