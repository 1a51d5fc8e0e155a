// Testimages builds the images that Kubernetes' own end-to-end tests ask for, under
// the names that they ask for, without a registry: the programs are built from Go
// modules, everything else is out of Debian packages.
//
//	e2e.test --list-images | testimages -programs DIR -debs DIR -o ARCHIVE
//
// Images for which there is no recipe are named at the end; tests that need one
// cannot run. It is no part of the product.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"kedge/internal/testimage"
)

func main() {
	programs := flag.String("programs", "", "folder of the programs that go into images")
	debs := flag.String("debs", "", "folder to keep Debian packages in")
	out := flag.String("o", "", "archive to write")
	flag.Parse()
	if *programs == "" || *debs == "" || *out == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(os.Stdin, workshop{*programs, *debs}, *out); err != nil {
		fmt.Fprintln(os.Stderr, "testimages:", err)
		os.Exit(1)
	}
}

// run builds all images that are named in list, one a line.
func run(list io.Reader, w workshop, out string) error {
	var images []testimage.Image
	var unknown []string
	for s := bufio.NewScanner(list); s.Scan(); {
		name := strings.TrimSpace(s.Text())
		if name == "" || slices.ContainsFunc(mustBeMissing, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		recipe, ok := recipes[repository(name)]
		if !ok {
			unknown = append(unknown, name)
			continue
		}
		img, err := recipe(w)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		img.Name = name
		images = append(images, img)
	}
	if len(images) == 0 {
		return fmt.Errorf("none of the images has a recipe: %q", unknown)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	if err := testimage.WriteFile(out, testimage.Docker, images...); err != nil {
		return err
	}
	fmt.Printf("built %d images\n", len(images))
	if len(unknown) > 0 {
		slices.Sort(unknown)
		fmt.Printf("without a recipe: %s\n", strings.Join(unknown, ", "))
	}
	return nil
}

// mustBeMissing are registries whose images tests expect not to get.
var mustBeMissing = []string{"invalid.registry.k8s.io/", "gcr.io/k8s-authenticated-test/"}

// repository is the last part of an image's name, as in "agnhost".
func repository(name string) string {
	base, _, _ := strings.Cut(path.Base(name), ":")
	return base
}

// recipe makes an image but for its name.
type recipe func(w workshop) (testimage.Image, error)

// recipes are the images by repository. What each must hold is in the Dockerfiles
// below test/images of the Kubernetes module.
var recipes = map[string]recipe{
	"agnhost":                agnhost,
	"busybox":                busybox,
	"etcd":                   single("etcd", "/usr/local/bin/etcd", []string{"/usr/local/bin/etcd"}, nil),
	"glibc-dns-testing":      resolver,
	"ipc-utils":              debian(nil, "util-linux", "bash", "coreutils"),
	"kitten":                 picture("kitten"),
	"nautilus":               picture("nautilus"),
	"nginx":                  nginx,
	"nonewprivs":             nonewprivs,
	"nonroot":                nonroot,
	"pause":                  single("pause", "/pause", []string{"/pause"}, nil),
	"perl":                   debian(nil, "perl", "bash", "coreutils"),
	"regression-issue-74839": single("regression-issue-74839", "/regression-issue-74839", []string{"/regression-issue-74839"}, nil),
	"resource-consumer":      consumer,
	"sample-apiserver":       single("sample-apiserver", "/sample-apiserver", []string{"/sample-apiserver"}, nil),
}

// single is an image with one program.
func single(program, at string, entrypoint, cmd []string) recipe {
	return func(w workshop) (testimage.Image, error) {
		f, err := w.program(program)
		if err != nil {
			return testimage.Image{}, err
		}
		return testimage.Image{Files: map[string]testimage.File{at: f}, Entrypoint: entrypoint, Cmd: cmd}, nil
	}
}

// debian is an image of packages with what they depend on, and a shell.
func debian(cmd []string, packages ...string) recipe {
	return func(w workshop) (testimage.Image, error) {
		files, err := w.packages(packages...)
		if err != nil {
			return testimage.Image{}, err
		}
		return testimage.Image{Files: files, Cmd: cmd, Env: searchPath}, nil
	}
}

var searchPath = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// busybox is Debian's with all of its tools. Its shell is that, or bash where it would
// lose something: see musl/sh.c.
func busybox(w workshop) (testimage.Image, error) {
	img, err := testimage.NewBusybox("")
	if err != nil {
		return img, err
	}
	tools, err := exec.Command(testimage.Busybox, "--list").Output()
	if err != nil {
		return img, fmt.Errorf("list the tools of busybox: %w", err)
	}
	for tool := range strings.FieldsSeq(string(tools)) {
		if name := "/bin/" + tool; img.Files[name].Data == nil {
			img.Files[name] = testimage.File{Link: "busybox"}
		}
	}
	const shell = "/usr/bin/bash-static"
	files, err := w.packages("bash-static")
	if err != nil {
		return img, err
	}
	bash, ok := files[shell]
	if !ok {
		return img, fmt.Errorf("the package bash-static has no %s", shell)
	}
	sh, err := w.program("sh")
	if err != nil {
		return img, err
	}
	img.Files["/bin/bash"], img.Files["/bin/sh"] = bash, sh
	return img, nil
}

// agnhost is the program that most tests run, with the tools that they call beside
// it. (Its wget is a real one: that of Debian's static busybox crashes with -T.)
func agnhost(w workshop) (testimage.Image, error) {
	files, err := w.packages("bash", "bind9-dnsutils", "coreutils", "curl", "grep", "iperf", "iproute2", "iputils-ping", "netcat-openbsd", "procps", "sed", "socat", "util-linux", "wget")
	if err != nil {
		return testimage.Image{}, err
	}
	program, err := w.program("agnhost")
	if err != nil {
		return testimage.Image{}, err
	}
	coredns, err := w.program("coredns")
	if err != nil {
		return testimage.Image{}, err
	}
	getent, err := w.program("getent")
	if err != nil {
		return testimage.Image{}, err
	}
	box, err := testimage.NewBusybox("")
	if err != nil {
		return testimage.Image{}, err
	}
	// Alpine's small tools are busybox's as well.
	for name, f := range box.Files {
		if _, ok := files["/usr"+name]; !ok && name != "/etc/passwd" && name != "/etc/group" {
			files["/usr"+name] = f
		}
	}
	maps.Copy(files, map[string]testimage.File{
		"/agnhost":        program,
		"/agnhost-2":      {Link: "agnhost"},
		"/coredns":        coredns,
		"/usr/bin/getent": getent, // musl's, as in the original image
		// Alpine's wget asks once. This one would ask twenty times, for four minutes,
		// where tests want to see that nobody answers.
		"/etc/wgetrc": {Data: []byte("tries = 1\n")},
		"/uploads":    {Mode: os.ModeDir | 0o755},
		"/etc/passwd": {Data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n" +
			"user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n")},
		"/etc/group": {Data: []byte("root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")},
	})
	for name, file := range map[string]string{"/localhost.crt": "porter/localhost.crt", "/localhost.key": "porter/localhost.key"} {
		if files[name], err = w.source("agnhost/" + file); err != nil {
			return testimage.Image{}, err
		}
	}
	return testimage.Image{Files: files, Env: searchPath, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}, nil
}

// picture is agnhost's web server with something to show. The original is built on
// Alpine, and a test of volumes that are images reads this file in a folder of it.
func picture(name string) recipe {
	return func(w workshop) (testimage.Image, error) {
		img, err := single("agnhost", "/agnhost", []string{"/agnhost"}, []string{"test-webserver"})(w)
		if err != nil {
			return img, err
		}
		for _, file := range []string{name + ".jpg", "data.json"} {
			if img.Files["/"+file], err = w.source(name + "/html/" + file); err != nil {
				return img, err
			}
		}
		img.Files["/etc/os-release"] = testimage.File{Data: []byte("NAME=\"Alpine Linux\"\nID=alpine\n")}
		return img, nil
	}
}

// resolver has the C library's resolver, whose rules differ from musl's and Go's.
func resolver(w workshop) (testimage.Image, error) {
	img, err := debian([]string{"bash"}, "bash", "bind9-dnsutils", "coreutils", "grep", "libc-bin", "libnss-myhostname", "sed", "mawk", "hostname", "base-files", "netbase")(w)
	if err != nil {
		return img, err
	}
	img.Files["/etc/nsswitch.conf"] = testimage.File{Data: []byte("passwd: files\ngroup: files\nhosts: files dns\n")}
	img.Files["/coredns"], err = w.program("coredns")
	return img, err
}

func nginx(w workshop) (testimage.Image, error) {
	img, err := debian([]string{"/usr/sbin/nginx", "-g", "daemon off;"}, "nginx-light", "bash", "coreutils", "curl", "netbase")(w)
	if err != nil {
		return img, err
	}
	maps.Copy(img.Files, map[string]testimage.File{
		"/etc/passwd":                      {Data: []byte("root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\n")},
		"/etc/group":                       {Data: []byte("root:x:0:\nwww-data:x:33:\nadm:x:4:\n")},
		"/var/log/nginx":                   {Mode: os.ModeDir | 0o755},
		"/var/lib/nginx":                   {Mode: os.ModeDir | 0o755},
		"/run":                             {Mode: os.ModeDir | 0o755},
		"/usr/share/nginx/html/index.html": {Data: []byte("<title>Welcome to nginx!</title>\n")},
		"/etc/nginx/nginx.conf": {Data: []byte("user www-data;\npid /run/nginx.pid;\nerror_log /dev/stderr;\nevents {}\n" +
			"http { access_log /dev/stdout; server { listen 80; root /usr/share/nginx/html; } }\n")},
	})
	return img, nil
}

func nonewprivs(w workshop) (testimage.Image, error) {
	img, err := single("nonewprivs", "/usr/local/bin/nnp", nil, []string{"/usr/local/bin/nnp"})(w)
	f := img.Files["/usr/local/bin/nnp"]
	f.Mode |= os.ModeSetuid | os.ModeSetgid
	img.Files["/usr/local/bin/nnp"] = f
	img.Env = searchPath
	return img, err
}

func nonroot(workshop) (testimage.Image, error) {
	img, err := testimage.NewBusybox("")
	img.User = "1234"
	return img, err
}

func consumer(w workshop) (testimage.Image, error) {
	img, err := debian(nil, "stress", "bash", "coreutils")(w)
	if err != nil {
		return img, err
	}
	if img.Files["/consumer"], err = w.program("resource-consumer"); err != nil {
		return img, err
	}
	img.Files["/consume-cpu"], err = w.program("consume-cpu")
	img.Entrypoint = []string{"/consumer"}
	return img, err
}
