package doctor

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// disk is a file system below a directory of kedge.
type disk struct {
	dir             string
	size, free      uint64
	inodes, inodesF uint64 // all and free; zero for file systems without a fixed number
	readOnly        bool
}

// The free space below which something happens. The API refuses changes at the least, the kubelet evicts pods at the
// percentages.
const (
	refusedBytes = 32 << 20
	leastBytes   = 256 << 20
	lowBytes     = 2 << 30
	evictSpace   = 15
	evictInodes  = 5
)

func judgeDisks(s *subject, disks []disk) (found []Finding) {
	for _, d := range disks {
		data := d.dir == s.DataDir
		room := fmt.Sprintf("make room (\"du -xh --max-depth=2 %s | sort -h\"; \"kedge images ls\" and \"kedge images rm\")", d.dir)
		if !data {
			room = fmt.Sprintf("make room (\"du -xh --max-depth=2 %s | sort -h\")", d.dir)
		}
		add := func(l Level, what, remedy string) {
			found = append(found, Finding{Level: l, Subject: "disk " + d.dir, What: what, Remedy: remedy})
		}
		free := fmt.Sprintf("only %s of %s are free", size(d.free), size(d.size))
		switch {
		case d.readOnly:
			add(Problem, "the file system is read-only, perhaps after an error of the disk", fmt.Sprintf("see \"dmesg\", check the file system, and remount it: \"mount -o remount,rw $(findmnt -nT %s -o TARGET)\"", d.dir))
		case d.free < refusedBytes:
			add(Problem, free+": nothing can be stored, and the API takes no changes but deletions", room)
		case d.free < leastBytes && data:
			add(Problem, free+": images are removed and pods evicted", room)
		case data && d.free < lowBytes:
			add(Warning, free+": a few images fill that", room)
		case data && d.free*100 < d.size*evictSpace:
			add(Warning, fmt.Sprintf("%s, less than %d %%: images are removed and pods evicted", free, evictSpace), room)
		}
		switch few := fmt.Sprintf("only %d of %d inodes are free", d.inodesF, d.inodes); {
		case d.inodes == 0:
		case d.inodesF*100 < d.inodes:
			add(Problem, few+": no file can be created soon", "remove directories with many small files")
		case data && d.inodesF*100 < d.inodes*evictInodes:
			add(Warning, few+": pods are evicted", "remove directories with many small files")
		}
	}
	return found
}

// syncs has the durations of synced writes of 4 KiB to the data directory, in order of their length.
type syncs struct {
	took    []time.Duration
	pending time.Duration // how long the write takes that had not finished; 0 for none
}

// percentile returns the duration that p percent of the writes did not exceed.
func (s syncs) percentile(p int) time.Duration {
	if len(s.took) == 0 {
		return 0
	}
	return s.took[min(len(s.took)-1, len(s.took)*p/100)]
}

// The latencies of synced writes. The datastore writes synced for each change, and its members exchange heartbeats.
const (
	slowP99, slowP50       = 50 * time.Millisecond, 20 * time.Millisecond
	stalledP99, stalledP50 = time.Second, 150 * time.Millisecond
)

func judgeSync(s *subject, m syncs) []Finding {
	remedy := "see with \"iostat -x 1\" or /proc/pressure/io what else uses the disk; put the data directory on a faster disk, an SSD, with --data-dir"
	if len(m.took) == 0 {
		return []Finding{{Level: Problem, Subject: "disk " + s.DataDir, What: fmt.Sprintf("a synced write of 4 KiB did not finish within %s: the disk stalls", m.pending.Round(time.Millisecond)), Remedy: "see \"dmesg\"; " + remedy}}
	}
	p50, p99 := m.percentile(50), m.percentile(99)
	what := fmt.Sprintf("synced writes of 4 KiB take %s (half of %d) and %s (99 %%)", round(p50), len(m.took), round(p99))
	consequence := ": pods start slowly"
	if s.Store {
		consequence = ": each change in the API waits for that"
	}
	switch {
	case p50 >= stalledP50 || p99 >= stalledP99:
		if s.Store {
			consequence += ", and servers may lose their leadership"
		}
		return []Finding{{Level: Problem, Subject: "disk " + s.DataDir, What: what + consequence, Remedy: remedy}}
	case p50 >= slowP50 || p99 >= slowP99:
		return []Finding{{Level: Warning, Subject: "disk " + s.DataDir, What: what + consequence, Remedy: remedy}}
	}
	return nil
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Millisecond {
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(time.Millisecond)
}

// certificate is a certificate in a file below the data directory.
type certificate struct {
	path, name          string
	notBefore, notAfter time.Time
	signed              time.Time // when the file was written; notBefore is earlier, for clocks that are wrong
	authority           bool
}

// certificates has the certificates that could be read, and files that could not.
type certificates struct {
	list    []certificate
	damaged []string
}

// renewedAt is the share of its life that a certificate has left when kedge renews it. A certificate with half of that
// was not renewed in time.
const renewedAt = 3

func judgeCertificates(s *subject, c certificates) (found []Finding) {
	authorities := map[string]bool{} // files of leaves have them too
	for _, cert := range c.list {
		if cert.authority && authorities[cert.name] {
			continue
		}
		authorities[cert.name] = authorities[cert.name] || cert.authority
		subject := "certificate " + short(s.DataDir, cert.path)
		renew := s.restart() + ": kedge renews its certificates when it starts"
		if cert.authority {
			renew = "restore the directory from a backup, or make a new cluster: all certificates of this cluster depend on the authority"
		} else if s.state == Stopped {
			renew = "start kedge: it renews its certificates when it starts"
		}
		life, left := cert.notAfter.Sub(cert.signed), cert.notAfter.Sub(s.now)
		switch {
		case left < 0:
			found = append(found, Finding{Level: Problem, Subject: subject, Since: cert.notAfter, What: fmt.Sprintf("the certificate of %s has expired", cert.name), Remedy: renew})
		case s.now.Before(cert.notBefore):
			found = append(found, Finding{Level: Problem, Subject: subject, What: fmt.Sprintf("the certificate of %s is valid only from %s: the clock is wrong, or was wrong when the certificate was signed", cert.name, cert.notBefore.UTC().Format(time.RFC3339)),
				Remedy: "set the clock; " + renew})
		case left < life/(2*renewedAt):
			found = append(found, Finding{Level: Warning, Subject: subject, What: fmt.Sprintf("the certificate of %s expires in %s, on %s, and was not renewed", cert.name, age(left), cert.notAfter.UTC().Format(time.DateOnly)), Remedy: renew})
		}
	}
	for _, path := range c.damaged {
		found = append(found, Finding{Level: Problem, Subject: "certificate " + short(s.DataDir, path), What: "the file cannot be read as a certificate",
			Remedy: "restore it from a backup, or remove it: kedge signs a missing certificate again when it starts; an authority must be restored"})
	}
	slices.SortFunc(found, func(a, b Finding) int { return strings.Compare(a.Subject, b.Subject) })
	return found
}

// short returns the path below dir.
func short(dir, path string) string {
	if rel, err := filepath.Rel(dir, path); err == nil && !strings.HasPrefix(rel, "..") {
		return rel
	}
	return path
}
