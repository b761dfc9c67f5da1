// pgx 4, the driver of most programs in Go.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
)

var background = context.Background()

// Counts what it is given.
type counter int

func (c *counter) Write(bytes []byte) (int, error) {
	*c += counter(len(bytes))
	return len(bytes), nil
}

// A row now and then, without end.
type slowRows struct{}

func (slowRows) Read(bytes []byte) (int, error) {
	time.Sleep(50 * time.Millisecond)
	return copy(bytes, strings.Repeat("x", 10_000)+"\n"), nil
}

// A session for the time of one step. pgx reads libpq's variables by itself.
func session(work func(*pgx.Conn) (string, error)) (string, error) {
	conn, err := pgx.Connect(background, "")
	if err != nil {
		return "", err
	}
	defer conn.Close(background)
	return work(conn)
}

func exec(conn *pgx.Conn, sql string) error {
	_, err := conn.Exec(background, sql)
	return err
}

func either(sql, yes, no string) (string, error) {
	return session(func(conn *pgx.Conn) (string, error) {
		var answer bool
		if err := conn.QueryRow(background, sql).Scan(&answer); err != nil {
			return "", err
		}
		if answer {
			return yes, nil
		}
		return no, nil
	})
}

func role() (string, error) {
	return either("SELECT pg_is_in_recovery()", "standby", "primary")
}

func tls() (string, error) {
	return either("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", "on", "off")
}

func large() (string, error) {
	return session(func(conn *pgx.Conn) (string, error) {
		var text string
		err := conn.QueryRow(background, "SELECT $1::text", strings.Repeat("x", 16<<20)).Scan(&text)
		return fmt.Sprint(len(text)), err
	})
}

func copyOut() (string, error) {
	return session(func(conn *pgx.Conn) (string, error) {
		var bytes counter
		sql := "COPY (SELECT generate_series(1, 100000)) TO STDOUT"
		_, err := conn.PgConn().CopyTo(background, &bytes, sql)
		return fmt.Sprint(bytes), err
	})
}

func copyIn() (string, error) {
	return session(func(conn *pgx.Conn) (string, error) {
		if err := exec(conn, "CREATE TEMPORARY TABLE numbers (n int)"); err != nil {
			return "", err
		}
		var lines strings.Builder
		for n := 1; n <= 100_000; n++ {
			fmt.Fprintln(&lines, n)
		}
		reader := strings.NewReader(lines.String())
		if _, err := conn.PgConn().CopyFrom(background, reader, "COPY numbers FROM STDIN"); err != nil {
			return "", err
		}
		var sum int64
		err := conn.QueryRow(background, "SELECT sum(n) FROM numbers").Scan(&sum)
		return fmt.Sprint(sum), err
	})
}

func cancel() (string, error) {
	return session(func(conn *pgx.Conn) (string, error) {
		asleep := make(chan error, 1)
		go func() { asleep <- exec(conn, "SELECT pg_sleep(60)") }()
		for {
			// A request may overtake the query that it is meant for.
			select {
			case err := <-asleep:
				var told *pgconn.PgError
				if errors.As(err, &told) {
					return told.Code, nil
				}
				return "finished", err
			case <-time.After(200 * time.Millisecond):
				if err := conn.PgConn().CancelRequest(background); err != nil {
					return "", err
				}
			}
		}
	})
}

func listen() (string, error) {
	return session(func(conn *pgx.Conn) (string, error) {
		if err := exec(conn, "LISTEN go"); err != nil {
			return "", err
		}
		notify := func(other *pgx.Conn) (string, error) { return "", exec(other, "NOTIFY go, 'hello'") }
		if _, err := session(notify); err != nil {
			return "", err
		}
		note, err := conn.WaitForNotification(background)
		if err != nil {
			return "", err
		}
		return note.Payload, nil
	})
}

// Does it until the session ends.
func hold(step string, waiting func()) error {
	_, err := session(func(conn *pgx.Conn) (string, error) {
		switch step {
		case "hold-query":
			waiting()
			return "", exec(conn, "SELECT pg_sleep(600)")
		case "hold-copy-in":
			if err := exec(conn, "CREATE TEMPORARY TABLE lines (line text)"); err != nil {
				return "", err
			}
			waiting()
			_, err := conn.PgConn().CopyFrom(background, slowRows{}, "COPY lines FROM STDIN")
			return "", err
		case "hold-copy-out":
			waiting()
			sql := "COPY (SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i) TO STDOUT"
			_, err := conn.PgConn().CopyTo(background, io.Discard, sql)
			return "", err
		default:
			if err := exec(conn, "LISTEN go_held"); err != nil {
				return "", err
			}
			waiting()
			_, err := conn.WaitForNotification(background)
			return "", err
		}
	})
	return err
}

func say(step, answer string, err error) {
	if err != nil {
		answer = strings.ReplaceAll(err.Error(), "\n", " ")
	}
	fmt.Printf("%s: %s\n", step, answer)
}

func main() {
	steps := map[string]func() (string, error){
		"role": role, "tls": tls, "large": large, "copy-out": copyOut, "copy-in": copyIn, "cancel": cancel, "listen": listen,
	}
	for _, step := range os.Args[1:] {
		if work, known := steps[step]; known {
			answer, err := work()
			say(step, answer, err)
			continue
		}
		if hold(step, func() { say(step, "waiting", nil) }) == nil {
			say(step, "finished", nil)
		} else {
			say(step, "ended", nil)
		}
		answer, err := role()
		say(step, answer, err)
	}
}
