// Testimages builds the images of Kubernetes' own end-to-end tests under their original names, without a
// registry: it builds the programs from Go modules, and takes everything else from Debian packages.
//
//	e2e.test --list-images | testimages -programs DIR -debs DIR -o ARCHIVE
//
// It names images without a recipe at the end; tests that need one cannot run. It is not part of the product.
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

	"kedge/internal/test/image"
)

func main() {
	programs := flag.String("programs", "", "folder of the programs that go into images")
	debs := flag.String("debs", "", "folder for Debian packages")
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

// run builds all images in list, which has one name per line.
func run(list io.Reader, w workshop, out string) error {
	var images []image.Image
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
	if err := image.WriteFile(out, image.Docker, images...); err != nil {
		return err
	}
	fmt.Printf("built %d images\n", len(images))
	if len(unknown) > 0 {
		slices.Sort(unknown)
		fmt.Printf("without a recipe: %s\n", strings.Join(unknown, ", "))
	}
	return nil
}

// mustBeMissing are registries whose images must not exist, according to the tests.
var mustBeMissing = []string{"invalid.registry.k8s.io/", "gcr.io/k8s-authenticated-test/"}

// repository returns the last part of an image's name, as in "agnhost".
func repository(name string) string {
	base, _, _ := strings.Cut(path.Base(name), ":")
	return base
}

// recipe returns an image without its name.
type recipe func(w workshop) (image.Image, error)

// recipes are the recipes by repository. The Dockerfiles in test/images of the Kubernetes module define the
// contents.
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

// single returns an image with one program.
func single(program, at string, entrypoint, cmd []string) recipe {
	return func(w workshop) (image.Image, error) {
		f, err := w.program(program)
		if err != nil {
			return image.Image{}, err
		}
		return image.Image{Files: map[string]image.File{at: f}, Entrypoint: entrypoint, Cmd: cmd}, nil
	}
}

// debian returns an image with packages, their dependencies, and a shell.
func debian(cmd []string, packages ...string) recipe {
	return func(w workshop) (image.Image, error) {
		files, err := w.packages(packages...)
		if err != nil {
			return image.Image{}, err
		}
		return image.Image{Files: files, Cmd: cmd, Env: searchPath}, nil
	}
}

var searchPath = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// busybox returns Debian's busybox with all of its tools. Its shell is busybox's, or bash where busybox's would
// lose data: see musl/sh.c.
func busybox(w workshop) (image.Image, error) {
	img, err := image.NewBusybox("")
	if err != nil {
		return img, err
	}
	tools, err := exec.Command(image.Busybox, "--list").Output()
	if err != nil {
		return img, fmt.Errorf("list the tools of busybox: %w", err)
	}
	for tool := range strings.FieldsSeq(string(tools)) {
		if name := "/bin/" + tool; img.Files[name].Data == nil {
			img.Files[name] = image.File{Link: "busybox"}
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

// agnhost returns the image that most tests use, with the tools that they call. (Its wget is the original: wget
// of Debian's static busybox crashes with -T.)
func agnhost(w workshop) (image.Image, error) {
	files, err := w.packages("bash", "bind9-dnsutils", "coreutils", "curl", "grep", "iperf", "iproute2", "iputils-ping", "netcat-openbsd", "procps", "sed", "socat", "util-linux", "wget")
	if err != nil {
		return image.Image{}, err
	}
	program, err := w.program("agnhost")
	if err != nil {
		return image.Image{}, err
	}
	coredns, err := w.program("coredns")
	if err != nil {
		return image.Image{}, err
	}
	getent, err := w.program("getent")
	if err != nil {
		return image.Image{}, err
	}
	box, err := image.NewBusybox("")
	if err != nil {
		return image.Image{}, err
	}
	// Alpine's small tools are busybox's too.
	for name, f := range box.Files {
		if _, ok := files["/usr"+name]; !ok && name != "/etc/passwd" && name != "/etc/group" {
			files["/usr"+name] = f
		}
	}
	maps.Copy(files, map[string]image.File{
		"/agnhost":        program,
		"/agnhost-2":      {Link: "agnhost"},
		"/coredns":        coredns,
		"/usr/bin/getent": getent, // musl's, as in the original image
		// Alpine's wget tries once. This wget would try twenty times, for four minutes, where tests expect no
		// answer.
		"/etc/wgetrc": {Data: []byte("tries = 1\n")},
		"/uploads":    {Mode: os.ModeDir | 0o755},
		"/etc/passwd": {Data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n" +
			"user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n")},
		"/etc/group": {Data: []byte("root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")},
	})
	for name, file := range map[string]string{"/localhost.crt": "porter/localhost.crt", "/localhost.key": "porter/localhost.key"} {
		if files[name], err = w.source("agnhost/" + file); err != nil {
			return image.Image{}, err
		}
	}
	return image.Image{Files: files, Env: searchPath, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}, nil
}

// picture returns agnhost's web server with content. The original is based on Alpine, and a test of image
// volumes reads this file in a folder of it.
func picture(name string) recipe {
	return func(w workshop) (image.Image, error) {
		img, err := single("agnhost", "/agnhost", []string{"/agnhost"}, []string{"test-webserver"})(w)
		if err != nil {
			return img, err
		}
		for _, file := range []string{name + ".jpg", "data.json"} {
			if img.Files["/"+file], err = w.source(name + "/html/" + file); err != nil {
				return img, err
			}
		}
		img.Files["/etc/os-release"] = image.File{Data: []byte("NAME=\"Alpine Linux\"\nID=alpine\n")}
		return img, nil
	}
}

// resolver returns an image with the C library's resolver, whose rules differ from musl's and Go's.
func resolver(w workshop) (image.Image, error) {
	img, err := debian([]string{"bash"}, "bash", "bind9-dnsutils", "coreutils", "grep", "libc-bin", "libnss-myhostname", "sed", "mawk", "hostname", "base-files", "netbase")(w)
	if err != nil {
		return img, err
	}
	img.Files["/etc/nsswitch.conf"] = image.File{Data: []byte("passwd: files\ngroup: files\nhosts: files dns\n")}
	img.Files["/coredns"], err = w.program("coredns")
	return img, err
}

func nginx(w workshop) (image.Image, error) {
	img, err := debian([]string{"/usr/sbin/nginx", "-g", "daemon off;"}, "nginx-light", "bash", "coreutils", "curl", "netbase")(w)
	if err != nil {
		return img, err
	}
	maps.Copy(img.Files, map[string]image.File{
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

func nonewprivs(w workshop) (image.Image, error) {
	img, err := single("nonewprivs", "/usr/local/bin/nnp", nil, []string{"/usr/local/bin/nnp"})(w)
	f := img.Files["/usr/local/bin/nnp"]
	f.Mode |= os.ModeSetuid | os.ModeSetgid
	img.Files["/usr/local/bin/nnp"] = f
	img.Env = searchPath
	return img, err
}

func nonroot(workshop) (image.Image, error) {
	img, err := image.NewBusybox("")
	img.User = "1234"
	return img, err
}

func consumer(w workshop) (image.Image, error) {
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
